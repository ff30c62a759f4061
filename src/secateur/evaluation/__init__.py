"""What a model is worth: perplexity, divergence from its reference, speed, memory, and the card that shows them."""

from secateur.evaluation.arithmetic import multiply_adds, parameters
from secateur.evaluation.card import ResultCard, write_json
from secateur.evaluation.divergence import Comparison, Divergence, compare, divergence
from secateur.evaluation.divergent import Continuations, DivergentTokens, divergent_tokens
from secateur.evaluation.energy import Meter
from secateur.evaluation.facts import Facts, read_facts
from secateur.evaluation.kick import Kick, KickScore, examine_dense, kick
from secateur.evaluation.measure import evaluate
from secateur.evaluation.memory import Memory, bytes_on_disk, memory
from secateur.evaluation.perplexity import Perplexity, Protocol, perplexity
from secateur.evaluation.speed import Pace, Speed, Spread, speed, speeds
from secateur.evaluation.table import render, sentences
from secateur.evaluation.tasks import TaskScore, load_tasks, score
from secateur.evaluation.text import Tokens, check_same_tokenizer, read_text, self_written, tokenize

__all__ = [
    "Comparison",
    "Continuations",
    "Divergence",
    "DivergentTokens",
    "Facts",
    "Kick",
    "KickScore",
    "Memory",
    "Meter",
    "Pace",
    "Perplexity",
    "Protocol",
    "ResultCard",
    "Speed",
    "Spread",
    "TaskScore",
    "Tokens",
    "bytes_on_disk",
    "check_same_tokenizer",
    "compare",
    "divergence",
    "divergent_tokens",
    "evaluate",
    "examine_dense",
    "kick",
    "load_tasks",
    "memory",
    "multiply_adds",
    "parameters",
    "perplexity",
    "read_facts",
    "read_text",
    "render",
    "score",
    "self_written",
    "sentences",
    "speed",
    "speeds",
    "tokenize",
    "write_json",
]
