"""`python -m secateur`, which is also how torchrun starts it."""

from secateur.cli import main

main()
