"""Shared by all tests: no network, and tiny random models with a tokenizer and text beside them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PAREDOWN_CACHE_GB"] = "0"  # no test depends on what another has measured
os.environ["TRITON_INTERPRET"] = "1"  # kernels run on CPU tensors; read by triton when it is imported

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()

WORDS = [
    "the", "a", "cat", "dog", "sat", "ran", "on", "under", "big", "red", "house", "tree", "and", "then", "it", "was",
    "very", "old",
]  # fmt: skip
SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256,
    "pad_token_id": 256,
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer():
    """Bytes and one special token: anything can be encoded, and nothing has to be trained."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE(vocab={**alphabet, "<eos>": 256}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<eos>", eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="session")
def save_model(tokenizer):
    """`save_model(folder, config, dtype)`: a random model of a config, made the same way every time."""

    def save(folder: Path, config, dtype=torch.bfloat16):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return model

    return save


@pytest.fixture(scope="session", autouse=True)
def no_pictures():
    """To draw a page takes longer than to compress a tiny model; pages have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paredown.compress.run.record.report_page", lambda report: "")
        yield


@pytest.fixture
def tiny_config():
    return transformers.LlamaConfig(**SIZES)


@pytest.fixture
def tiny_model(tmp_path, save_model, tiny_config):
    """The folder of a tiny Llama."""
    save_model(tmp_path / "model", tiny_config)
    return tmp_path / "model"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Enough words for some windows of 64 tokens."""
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (2000,), generator=generator).tolist()]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="session")
def windows():
    """Random tokens of a tiny vocabulary, as the pipeline takes them."""
    from paredown.compress.text.windows import Windows

    return Windows(torch.randint(3, 128, (6, 24), generator=torch.Generator().manual_seed(0)), "random", "all", "0")


@pytest.fixture(scope="session")
def prune(windows):
    """`prune(folder, out, ...)`: the pipeline and the whole record, without report, card and the process that verifies."""
    from paredown.compress.checkpoint.source import ModelSource
    from paredown.compress.checkpoint.writer import CheckpointWriter
    from paredown.compress.progress import Progress, ignore
    from paredown.compress.recipe import Recipe
    from paredown.compress.run.pipeline import Run
    from paredown.compress.run.record import write_record
    from paredown.compress.run.smaller import SmallerRun
    from paredown.compress.shape_job import ShapeJob, resolve

    def run(
        folder,
        out,
        sparsity="2:4",
        format="packed",
        method="wanda",
        progress=ignore,
        doing=ignore,
        text=windows,
        **changes,
    ):
        recipe = Recipe.parse({"method": method, "options": {"sparsity": sparsity}, **changes})
        job = resolve(ModelSource(folder, folder.name), recipe, format)
        walk = SmallerRun if isinstance(job, ShapeJob) else Run
        with CheckpointWriter(out) as writer:
            result = walk(job, text, [windows], writer, Progress(progress, doing=doing)).run()
            write_record(writer, job, result, windows)
            writer.commit()
        return result, writer

    return run


@pytest.fixture(scope="session")
def lively(tmp_path_factory, save_model, prune):
    """`lively(form, dtype)`: the folder of the model LIVELY, compressed to one of FORMS; without a form the dense one."""
    from recovering import FORMS, LIVELY

    known = {}

    def make(form=None, dtype=torch.bfloat16):
        if (form, dtype) not in known:
            folder = tmp_path_factory.mktemp("lively") / (form or "dense")
            if form is None:
                save_model(folder, LIVELY, dtype)
            else:
                prune(make(None, dtype), folder, **FORMS[form])
            known[form, dtype] = folder
        return known[form, dtype]

    return make


@pytest.fixture
def verified_here(monkeypatch):
    """A run verifies its checkpoint in this process: a new one takes seconds to import transformers."""
    from paredown.compress.errors import PareError
    from paredown.compress.run import once as module
    from paredown.compress.run.verify import verify

    def check(folder, note):
        if faults := verify(folder):
            raise PareError("\n".join(faults))

    monkeypatch.setattr(module, "_verify", check)


@pytest.fixture(scope="session")
def logits_of(windows):
    """`logits_of(folder)`: those of transformers' own forward over `windows`."""
    from paredown.compress.checkpoint import transformers_plugin

    def run(folder):
        model = transformers_plugin.load(folder, experts_implementation="eager").eval()
        with torch.no_grad():
            return model(windows.ids, use_cache=False).logits

    return run
