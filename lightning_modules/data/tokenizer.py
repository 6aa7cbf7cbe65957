"""The tokenizer of a trial: the backbone's own, or a byte-pair one trained on the tasks' texts for the built-in backbones."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_modules.building import ConfigError
from lightning_modules.config import BackboneConfig, TrialConfig
from lightning_modules.data.posing import formed
from lightning_modules.data.tasks import TaskSpec
from lightning_modules.files import atomic_folder

VERSION = 2
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def tokenizer_key(config: TrialConfig) -> str:
    """16 hex digits of what decides the token ids: the backbone's content, or the training texts and vocabulary size."""
    if config.backbone.built_in:
        tasks = config.backbone.size.tokenizer_tasks or config.mixture.tasks
        content = [
            VERSION,
            config.data.form,
            config.backbone.size.vocab_size,
            [[name, config.digests.get(name)] for name in sorted(tasks)],
        ]
    else:
        content = [config.digests.get("backbone", config.backbone.name), config.backbone.revision]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def prepare_tokenizer(config: TrialConfig, specs: Mapping[str, TaskSpec], root: Path) -> Path:
    """The folder of the trial's tokenizer under ``root``, written if it is not there yet."""
    folder = root / f"tokenizer-{tokenizer_key(config)}"
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            if config.backbone.built_in:
                tasks = config.backbone.size.tokenizer_tasks or config.mixture.tasks
                texts = (text for name in sorted(tasks) for text in _texts(formed(specs[name], config.data.form)))
                tokenizer = train_tokenizer(texts, config.backbone.size.vocab_size)
            else:
                tokenizer = _released(config.backbone)
            tokenizer.save_pretrained(temporary)
    return folder


def _released(backbone: BackboneConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a Hub model.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(backbone.name, revision=backbone.revision)
    except (OSError, ValueError) as error:
        where = "the network is needed for the first use of a Hub model" if backbone.revision else "is it a complete folder?"
        law = f"cannot read the tokenizer of {backbone.name!r} ({' '.join(str(error).split())[:200]}); {where}"
        raise ConfigError("trial.backbone.name", law) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer written by :func:`prepare_tokenizer`."""
    return AutoTokenizer.from_pretrained(folder)


def wants_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a list of words must carry its spaces to be read as the text is: byte-level tokenizers of released models
    (RoBERTa, BART, ModernBERT) put a word's space into its first token, and read words in a list as if glued together."""
    text = tokenizer("a cat", add_special_tokens=False)["input_ids"]
    words, spaced = (
        tokenizer(["a", word], is_split_into_words=True, add_special_tokens=False)["input_ids"] for word in ("cat", " cat")
    )
    return words != text and spaced == text


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with BERT's special tokens; [CLS] begins a text and [SEP] ends it, for encoder and decoder
    alike. Unlike WordPiece training it is deterministic (INTEGRATION 5), so the same texts give the same ids everywhere."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    names = {f"{name.strip('[]').lower()}_token": name for name in SPECIALS}
    names |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names
    )


def _texts(spec: TaskSpec) -> Iterator[str]:
    for row in spec.read("train"):
        if "tokens" in row:
            yield " ".join(row["tokens"])
        else:
            texts = [row["text"], row.get("text_pair"), *row.get("options", ()), *(row.get("targets") or [row.get("target")])]
            yield from (text for text in texts if text)
