"""What `params.json` cannot say: which member of the family a checkpoint is.

A kind fixes the prompt format, the tokens that end an answer, the RoPE factor and the trained
context. `decide_kind` chooses it from what is at hand and says why. Knows no files and no arrays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlx_llama.errors import OptionError

BARE_SIZE = re.compile(r"(7|13|30|33|65)B", re.IGNORECASE)
CODELLAMA_THETA = 1e6  # of all but the 70B Instruct and Python models, which have Llama 2's
LLAMA3_INSTRUCT_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


@dataclass(frozen=True, slots=True)
class Kind:
    """One member of the family.

    prompt: name of the prompt format, or "raw" for a base model (BOS and text).
    stops: names of the special tokens that end an answer; the tokenizer's EOS always does.
    context: trained context in tokens.
    """

    name: str
    prompt: str
    context: int
    stops: tuple[str, ...] = ()

    @property
    def is_tiktoken(self) -> bool:
        """Whether its tokenizer is Llama 3's (tiktoken), not Llama 2's (SentencePiece)."""
        return self.name.startswith(("llama3", "llama-guard-2", "llama-guard-3"))

    @property
    def is_base(self) -> bool:
        """Whether the model only completes text."""
        return self.prompt == "raw"


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("llama1", "raw", 2048),
        Kind("llama2", "raw", 4096),
        Kind("llama2-chat", "llama2", 4096),
        Kind("codellama", "raw", 16384),
        Kind("codellama-instruct", "llama2", 16384),
        Kind("codellama-70b-instruct", "codellama-70b", 4096, ("<step>",)),
        Kind("llama3", "raw", 8192),
        Kind("llama3-instruct", "llama3", 8192, LLAMA3_INSTRUCT_STOPS),
        Kind("llama3.1", "raw", 131072),
        Kind("llama3.1-instruct", "llama3.1", 131072, LLAMA3_INSTRUCT_STOPS),
        Kind("llama3.2", "raw", 131072),
        Kind("llama3.2-instruct", "llama3.1", 131072, LLAMA3_INSTRUCT_STOPS),
        Kind("llama3.3-instruct", "llama3.1", 131072, LLAMA3_INSTRUCT_STOPS),
        Kind("llama-guard-1", "guard", 4096),
        Kind("llama-guard-2", "guard", 8192, LLAMA3_INSTRUCT_STOPS),
        Kind("llama-guard-3", "guard", 131072, LLAMA3_INSTRUCT_STOPS),
    )
}


@dataclass(frozen=True, slots=True)
class Decision:
    """A value that was inferred, with the reason shown to the user."""

    value: str
    reason: str


def kind_named(name: str) -> Kind:
    """Return the kind called `name`; OptionError lists the known ones."""
    if name not in KINDS:
        raise OptionError(f"kind {name!r} is unknown: choose one of {', '.join(KINDS)}")
    return KINDS[name]


def decide_kind(
    *,
    flag: str | None,
    recorded: str | None,
    chat_template: str | None,
    names: Iterable[str],
    base: str,
    is_tiktoken: bool,
) -> Decision:
    """Choose the kind of a checkpoint and say why.

    flag: what the user asked for. recorded: `mlx_llama.kind` of a config.json. names: folder and
    repository names, nearest first; one that does not fit the tokenizer is passed over.
    base: the base kind that fits the architecture (`base_kind`).
    """
    if flag is not None:
        kind = kind_named(flag)
        if kind.is_tiktoken != is_tiktoken:
            family = "tiktoken" if kind.is_tiktoken else "SentencePiece"
            raise OptionError(f"--kind {flag}: needs a {family} tokenizer, this model's is another")
        return Decision(kind.name, "asked for with --kind")
    if recorded is not None:
        return Decision(kind_named(recorded).name, "recorded in config.json")
    fitting = (
        (kind, name)
        for name in names
        if (kind := kind_of_name(name)) and KINDS[kind].is_tiktoken == is_tiktoken
    )
    # A bare size says little: another name goes first, and Llama 2 had folders of sizes, too.
    by_name = min(fitting, key=lambda found: bool(BARE_SIZE.fullmatch(found[1])), default=None)
    if by_name and BARE_SIZE.fullmatch(by_name[1]) and not (base == "llama1" or "65" in by_name[1]):
        by_name = None
    if chat_template and (format_name := prompt_of_template(chat_template)):
        if by_name and KINDS[by_name[0]].prompt == format_name:
            return Decision(by_name[0], f"chat template and the name {by_name[1]!r}")
        return Decision(_instruct_kind(format_name, base), "chat template")
    if by_name:
        return Decision(by_name[0], f"the name {by_name[1]!r}")
    return Decision(base, "no name or chat template says more: taken for a base model")


def base_kind(
    *,
    is_tiktoken: bool,
    is_rope_scaled: bool,
    is_tied: bool,
    norm_eps: float,
    rope_theta: float | None,
) -> str:
    """Name the base kind that fits what the weights and tokenizer show."""
    if not is_tiktoken:
        if rope_theta is not None and rope_theta >= CODELLAMA_THETA:
            return "codellama"
        # norm_eps 1e-6 is what tells LLaMA 1 (7B to 30B) from Llama 2.
        return "llama1" if norm_eps < 5e-6 else "llama2"
    if not is_rope_scaled:
        return "llama3"
    return "llama3.2" if is_tied else "llama3.1"


def kind_of_name(name: str) -> str | None:
    """Read the kind from a folder's or repository's name: `Llama-3.2-1B-Instruct`."""
    text = name.lower().replace("_", "-")
    # Prompt Guard is no Llama, and Llama Guard 4 a Llama 4.
    if match := re.search(r"(?<!prompt-)guard-?v?(\d)?(?=$|[^\d.b])", text):
        guard = f"llama-guard-{match[1] or 1}"
        return guard if guard in KINDS and ("llama" in text or match[1]) else None
    is_instruct = bool(re.search(r"instruct|chat|-it(?=$|-)", text))
    if re.search(r"code-?llama", text):
        if is_instruct:
            return "codellama-70b-instruct" if "70b" in text else "codellama-instruct"
        return "codellama"
    match = re.search(r"llama-?v?([123](?:\.[123])?)(?![\d.])", text)
    if not match:
        # LLaMA 1 came in folders that were called after its sizes alone.
        is_size = re.search(r"(?:^|[^a-z])llama-?(?:7b|13b|30b|33b|65b)(?=$|[^\d])", text)
        return "llama1" if is_size or BARE_SIZE.fullmatch(name) else None
    version = match[1]
    suffix = ("-chat" if version == "2" else "-instruct") if is_instruct else ""
    if version == "3.3":
        suffix = "-instruct"  # 3.3 was published in that form only
    return name if (name := f"llama{version}{suffix}") in KINDS else None


def prompt_of_template(template: str) -> str | None:
    """Recognise the prompt format behind a Jinja chat template; the template is never executed."""
    if "Task: Check if there is unsafe content" in template:
        return "guard"
    if "<|start_header_id|>" in template:
        is_dated = "Cutting Knowledge Date" in template
        return "llama3.1" if is_dated else "llama3"
    if "[INST]" in template:
        return "llama2"
    if "Source: " in template and "<step>" in template:
        return "codellama-70b"
    return None


def _instruct_kind(prompt: str, base: str) -> str:
    if prompt == "guard":
        return {"llama2": "llama-guard-1", "llama3": "llama-guard-2"}.get(base, "llama-guard-3")
    if prompt == "llama2":
        return "codellama-instruct" if base.startswith("codellama") else "llama2-chat"
    if prompt == "codellama-70b":
        return "codellama-70b-instruct"
    if prompt == "llama3" and base in ("llama3", "llama1", "llama2"):
        return "llama3-instruct"
    return "llama3.2-instruct" if base == "llama3.2" else "llama3.1-instruct"


# RoPE factor of models with `use_scaled_rope`, by (dim, n_layers). Meta's own code says 8 for all
# of them, which is wrong for the 3.2 models (llama-models issues 166 and 241).
ROPE_FACTORS: Mapping[tuple[int, int], float] = {
    (2048, 16): 32.0,
    (3072, 28): 32.0,
    (4096, 32): 8.0,
    (8192, 80): 8.0,
    (16384, 126): 8.0,
}


def decide_rope_factor(
    *, flag: float | None, recorded: float | None, dim: int, n_layers: int, is_tied: bool
) -> tuple[float, str]:
    """Choose the factor of Llama 3.1's RoPE scaling and say why."""
    if flag is not None:
        return flag, "asked for with --rope-factor"
    if recorded is not None:
        return recorded, "config.json"
    if (factor := ROPE_FACTORS.get((dim, n_layers))) is not None:
        return factor, f"the known shape dim {dim}, {n_layers} layers"
    if is_tied:
        return 32.0, "an unknown shape with tied output, as in Llama 3.2"
    return 8.0, "an unknown shape with its own output, as in Llama 3.1"
