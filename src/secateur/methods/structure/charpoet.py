"""CharPoet: a vocabulary of single characters, so that the number of characters written can be said exactly.

Yu and others, "CharPoet: A Chinese Classical Poetry Generation System Based on Token-free LLM", arXiv:2401.03512. Long
tokens are deleted from vocabulary and head; tokens of one character or one byte stay. The paper then tunes the model on
poetry, which is a step of its own, and without which texts are clearly worse.

The paper leaves open what becomes of English words and of characters of several byte tokens. Here every token that writes
more than one code point goes, in any language, but for what a tokenizer has added to its vocabulary: texts are split at such
tokens before anything else, so without them other texts than theirs would be split otherwise too. Most are special; some
write text, as GPT-NeoX's runs of spaces do, and the receipt counts them. Parts of characters stay where a kept character is
merged from them. `secateur.generate_lengths` counts characters, not tokens, so its lengths hold for all of them.
"""

from secateur.registry import Context, KeptTokens, Vocabulary, method


@method(
    "charpoet",
    kind="structure",
    paper="arXiv:2401.03512",
    claim="formats are met in more than 96 % of poems, against 38 % of GPT-4",
    when="after training",
    speedup="universal",
    criterion="characters",
    schedule="one-shot",
)
def charpoet(words: Vocabulary, context: Context) -> KeptTokens:
    """Keeps tokens that write one character or one byte, and special and added ones, for text of an exact length."""
    longer = [token for token in words.added - words.special if len(words.strings[token]) > 1]
    if longer:
        context.note("added tokens of several characters, kept", len(longer))
    return words.keep(token for token in words.strings if len(words.text_of(token) or "") == 1)
