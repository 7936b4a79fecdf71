"""Makes a Mixture-of-Experts of a dense Llama, and says how far it is from its parent.

    python tools/upcycle.py --hf Llama-3.2-1B --method copy --experts 8 --top-k 2 --out llama-moe
    python tools/upcycle.py --hf Llama-2-7b --method sharing_inter --experts 7 --top-k 1 --text notes/ --out llama-moe
    python tools/upcycle.py --hf base --method mix --models math code --experts 3 --top-k 2 --out btx

Methods: copy half drop virtual mix (copies of the whole layer), random clustering gradient llama_moe_v2 (the neurons
shared out), sharing_inner sharing_inter residual (neurons by importance). --attention-experts splits attention too.
docs/upcycling.md says what each is for. The result is a Hugging Face folder or a checkpoint to start from. The receipt
compares it with the dense parent on real text; where theory gives a bound and it does not hold, the exit code is 1.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from torch import Tensor

    from moe_engine.checkpoint.hf.folder import HfFolder
    from moe_engine.checkpoint.weights_only import Written
    from moe_engine.config import Model
    from moe_engine.model.transformer import Transformer
    from moe_engine.upcycle import Options
    from tools.upcycling.source import RouterRows, Upcycled

BROKEN_PROMISE = 1
OF_FEATURES, OF_PROMPTS = ("clusters", "random_features"), ("hidden", "hidden_avg", "cheap_embed")
OPTIONS: dict[str, tuple[Any, str]] = {
    "experts": (int, "routed experts of a layer (default 8)"),
    "top_k": (int, "experts of a token (default 2)"),
    "seed": (int, "of everything that is drawn"),
    "norm_topk_prob": (None, "do not renormalise the weights of the chosen experts"),
    "dense_ends": (int, "first and last layers that stay dense (default 0)"),
    "noise_std": (float, "copy, half: noise on the experts' weights"),
    "noise_share": (float, "share of the elements that get it"),
    "scale": (float, "factor on the routed output (default: the method's)"),
    "drop_ratio": (float, "drop: share of the neurons drawn anew (default 0.5)"),
    "granularity": (int, "virtual: shards of a layer"),
    "residual_experts": (int, "sharing_inter, residual: widths of the expert that is always on (default 1)"),
    "share_neurons": (None, "sharing_inter, residual: a neuron belongs to one routed expert only"),
    "expert_width": (int, "sharing methods: neurons of an expert"),
    "projection": (str, "clustering: gate or up, whose rows"),
    "compat": (bool, "as the method's released code does, where that differs from its paper"),
    "attention_experts": (int, "split attention into so many experts, by KV heads"),
    "attention_top_k": (int, "of which a token takes so many (default 2)"),
    "attention_scale": (float, "factor on their output (default A/k)"),
}


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)

    from moe_engine.config_report import BULLET
    from moe_engine.errors import EngineError
    from moe_engine.log import printable

    try:
        return upcycle(options)
    except EngineError as error:
        print(f"error: {BULLET.join(map(printable, str(error).split(BULLET)))}", file=sys.stderr)
        return error.exit_code


def parser() -> argparse.ArgumentParser:
    """The flags; those of OPTIONS are fields of upcycle.Options."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--hf", type=Path, required=True, metavar="DIR", help="the dense parent")
    out.add_argument("--method", required=True, metavar="NAME")
    out.add_argument("--out", type=Path, required=True, metavar="PATH", help="what to write")
    out.add_argument("--format", choices=("hf", "checkpoint"), default="hf", help="a folder (default) or a checkpoint")
    out.add_argument("--family", metavar="NAME", help="model_type of the folder (default: the first that holds it)")
    out.add_argument("--models", type=Path, nargs="+", default=[], metavar="DIR", help="mix: the other dense models")
    for name, (kind, text) in OPTIONS.items():
        flag = "--" + name.replace("_", "-")
        if kind is None:
            out.add_argument(f"--no-{flag[2:]}", dest=name, action="store_false", default=argparse.SUPPRESS, help=text)
        elif kind is bool:
            out.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            out.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text)
    out.add_argument("--router-init", default="normal", metavar="NAME", help="first rows of routers (default normal)")
    out.add_argument("--router-std", type=float, default=0.02, metavar="X", help="of normal rows (default 0.02)")
    out.add_argument("--prompts", type=Path, metavar="FILE.yaml", help="experts: [{positive_prompts: [..]}, ..]")
    out.add_argument("--importance", choices=("feature_change", "total", "feature_grad"), default="feature_change")
    out.add_argument("--text", nargs="+", default=[], metavar="FILE", help="text to look at (default: Python's own)")
    out.add_argument("--text-tokens", type=int, default=65536, metavar="N", help="of it, for importance and routers")
    out.add_argument("--seq-length", type=int, default=512, metavar="N", help="tokens of one sequence of it")
    out.add_argument("--tokenizer", metavar="SPEC", help="default: the parent's")
    out.add_argument("--receipt-tokens", type=int, default=1024, metavar="N", help="compared; 0: no receipt")
    return out


def upcycle(given: argparse.Namespace) -> int:
    """Make it, write it, compare it."""
    from moe_engine.checkpoint.hf.folder import HfFolder
    from moe_engine.errors import ConfigError
    from moe_engine.upcycle import METHODS, Options, attention

    if given.method not in METHODS:
        raise ConfigError(f"--method {given.method}: expected {', '.join(METHODS)}")
    if given.out.exists():
        raise ConfigError(f"--out {given.out} exists; remove it or choose another name")
    options = Options(**{name: getattr(given, name) for name in OPTIONS if hasattr(given, name)})
    parents = [HfFolder(path) for path in (given.hf, *given.models)]
    check_parents(given, parents, options)
    child = METHODS[given.method].child(parents[0].model, options)
    if options.attention_experts:
        child = attention.child(child, options)
    target = hf_target(given, child, parents[0]) if given.format == "hf" else None
    source = source_of(given, options, parents, child)
    written = write(given, source, child, target, parents[0])
    print(f"{given.method}: {len(written.tensors):,} tensors, {written.bytes / 1e9:.3f} GB in {given.out}")
    if not given.receipt_tokens:
        return 0
    expected = METHODS[given.method].expected(options)
    if options.attention_experts:
        expected = attention.expected(options)
    return compare(given, parents[0], expected)


def check_parents(given: argparse.Namespace, parents: "list[HfFolder]", options: "Options") -> None:
    """ConfigError for parents that do not go with the method or with each other."""
    from moe_engine.errors import ConfigError

    if given.models and given.method != "mix":
        raise ConfigError(f"--models is for --method mix, found {given.method}")
    if given.method == "mix" and len(parents) != options.experts:
        raise ConfigError(
            f"--experts {options.experts} of {len(parents)} models (--hf and --models): give one for each expert"
        )
    for parent in parents[1:]:
        if parent.model != parents[0].model:
            raise ConfigError(f"{parent.folder} is another model than {parents[0].folder}: their config.json differ")


def source_of(given: argparse.Namespace, options: "Options", parents: "list[HfFolder]", child: "Model") -> "Upcycled":
    """The child's weights; the dense model runs if the method or the routers look at text."""
    import torch

    from moe_engine.upcycle import SCORED
    from moe_engine.upcycle.features import group_sequences, sequence_features
    from moe_engine.upcycle.importance import neuron_importance
    from tools.upcycling.source import Upcycled
    from tools.upcycling.text import batches

    looks = given.method in SCORED or given.router_init in (*OF_FEATURES, *OF_PROMPTS)
    dense = dense_model(parents[0]) if looks else None
    tokens_BS = text_of(given, parents[0], given.text_tokens) if looks else None
    router, gates = router_of(given, options, parents[0], dense, tokens_BS)
    scores = None
    if given.method in SCORED:
        assert dense is not None and tokens_BS is not None
        group_B = torch.zeros(len(tokens_BS), dtype=torch.int64)
        if gates is None:
            each = [sequence_features(dense, batch) for batch in batches(tokens_BS, group_B)]
            group_B = group_sequences(torch.cat(each), options.experts, options.seed)
        sample = batches(tokens_BS, group_B)
        scores = neuron_importance(dense, sample, options.experts, gates, given.importance)
    attention_router = drawn_rows(given, options, parents[0], "attention")
    return Upcycled(parents, child, given.method, options, router, attention_router, scores)


def router_of(
    given: argparse.Namespace,
    options: "Options",
    parent: "HfFolder",
    dense: "Transformer | None",
    tokens_BS: "Tensor | None",
) -> "tuple[RouterRows, list[Tensor] | None]":
    """The rows of the FFN routers, and the same as gates for importance when they come from the text."""
    import torch

    from moe_engine.upcycle import routers
    from moe_engine.upcycle.features import mlp_inputs
    from moe_engine.upcycle.prompts import prompt_rows
    from tools.upcycling.text import batches, tokenizer_of

    if given.router_init not in (*OF_FEATURES, *OF_PROMPTS):
        return drawn_rows(given, options, parent, ""), None
    assert dense is not None and tokens_BS is not None
    if given.router_init in OF_PROMPTS:
        tokenizer = tokenizer_of(given.hf, given.tokenizer, parent.model.vocab_size)
        bos = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        rows_NED = prompt_rows(given.router_init, dense, read_prompts(given, options, tokenizer), bos)
        return lambda layer, experts: rows_NED[layer], None
    make = getattr(routers, given.router_init)
    groups = torch.zeros(len(tokens_BS), dtype=torch.int64)
    gates = []
    for layer in range(parent.model.num_hidden_layers):  # one layer's features at a time
        each = [mlp_inputs(dense, batch, layers=[layer])[layer] for batch in batches(tokens_BS, groups)]
        gates.append(make(torch.cat(each), options.experts, layer, options.seed))
    return (lambda layer, experts: gates[layer]), gates


def drawn_rows(given: argparse.Namespace, options: "Options", parent: "HfFolder", which: str) -> "RouterRows":
    """Rows that need no data; attention's routers are of this kind always, and so is virtual's repetition."""
    from moe_engine.parallel.weight import key_of
    from moe_engine.upcycle import routers, virtual

    kind = given.router_init if given.router_init in (*routers.DRAWN, "normal") else "normal"
    if kind != given.router_init and given.router_init not in (*OF_FEATURES, *OF_PROMPTS):
        routers.drawn(given.router_init, 1, 1, 0, 0)  # refuses it by name
    seed = key_of(options.seed, which) if which else options.seed

    def rows(layer: int, experts: int) -> "Tensor":
        drawn = routers.drawn(kind, experts, parent.model.hidden_size, layer, seed, given.router_std)
        return virtual.repeat_rows(drawn, options) if given.method == "virtual" and not which else drawn

    return rows


def read_prompts(given: argparse.Namespace, options: "Options", tokenizer: Any) -> list[Any]:
    """The prompts of --prompts as token ids."""
    from moe_engine.config_files import read_mapping
    from moe_engine.errors import ConfigError
    from moe_engine.upcycle.prompts import ExpertPrompts

    if given.prompts is None:
        raise ConfigError(f"--router-init {given.router_init} needs --prompts FILE.yaml")
    experts = read_mapping(given.prompts).get("experts")
    if (
        not isinstance(experts, list)
        or len(experts) != options.experts
        or not all(isinstance(e, dict) for e in experts)
    ):
        raise ConfigError(f"{given.prompts}: experts: expected a list of {options.experts} mappings, one an expert")

    def ids(expert: dict[str, Any], key: str) -> list[list[int]]:
        return [tokenizer.encode([str(text)])[0].tolist() for text in expert.get(key) or []]

    return [ExpertPrompts(ids(e, "positive_prompts"), ids(e, "negative_prompts")) for e in experts]


def hf_target(given: argparse.Namespace, child: "Model", parent: "HfFolder") -> Any:
    """What the folder will be; refused before anything is computed when no family holds the child."""
    from moe_engine.checkpoint.hf.carried import side_files
    from moe_engine.checkpoint.hf.families import TABLES
    from moe_engine.checkpoint.hf.write import Target
    from moe_engine.config_hf import FAMILIES, family_of
    from moe_engine.errors import ConfigError

    if given.family and given.family not in FAMILIES:
        raise ConfigError(f"--family {given.family}: expected {', '.join(FAMILIES)}")
    try:
        family = given.family or family_of(child)
    except ConfigError as error:
        raise ConfigError(f"{error}. --format checkpoint holds every model") from None
    return Target(family, next(iter(TABLES[family])), side=side_files(parent.folder))


def write(given: argparse.Namespace, source: Any, child: "Model", target: Any, parent: "HfFolder") -> "Written":
    """The folder, or the checkpoint with 5 GB a file."""
    from moe_engine.checkpoint.hf.carried import side_files
    from moe_engine.checkpoint.hf.read import identity_of
    from moe_engine.checkpoint.hf.write import SHARD_BYTES, cut, write_hf
    from moe_engine.checkpoint.pieces import Piece, volume
    from moe_engine.checkpoint.shard import Entry
    from moe_engine.checkpoint.weights_only import write_weights

    identity = [identity_of(parent), {k: str(v) for k, v in sorted(vars(given).items())}]
    if target is not None:
        return write_hf(source, child, target, given.out, identity)
    boxes = {name: tuple((0, side) for side in shape) for name, shape in source.shapes.items()}
    entries = {name: Entry(source.dtype(name, box), source.shapes[name]) for name, box in boxes.items()}
    files = [
        {name: Piece(name, boxes[name], 0, volume(boxes[name])) for name in names}
        for names in cut(entries, SHARD_BYTES).values()
    ]
    return write_weights(source, child, files, side_files(parent.folder), {}, given.out, identity)


def compare(given: argparse.Namespace, parent: "HfFolder", expected: Any) -> int:
    """The receipt, from what was written."""
    from moe_engine.checkpoint.hf.export import open_checkpoint
    from moe_engine.checkpoint.hf.folder import HfFolder
    from moe_engine.upcycle.receipt import receipt

    if given.format == "hf":
        source = HfFolder(given.out)
        child = dense_model(source)
    else:
        reader, model = open_checkpoint(given.out)
        child = load(reader, model)
    found = receipt(dense_model(parent), child, text_of(given, parent, given.receipt_tokens), expected)
    print(
        f"receipt     logits differ by {found.max:.3g} at most, {found.mean:.3g} on average (largest {found.largest:.3g})"
    )
    print(f"            the most likely next token is the same for {100 * found.argmax_agreement:.1f} % of the tokens")
    print(f"theory      {found.expected}")
    if not found.holds:
        print(
            f"error: theory bounds the difference by {found.bound} of the largest logit: this is a bug", file=sys.stderr
        )
        return BROKEN_PROMISE
    return 0


def dense_model(folder: "HfFolder") -> "Transformer":
    """The model of a folder in fp32 on one rank."""
    return load(folder, folder.model)


def load(source: Any, model: "Model") -> "Transformer":
    """A model in fp32 on one rank, its weights read from a source."""
    import torch

    from moe_engine.model.transformer import Transformer
    from moe_engine.parallel.mesh import Mesh

    decoder = Transformer(model, Mesh())
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(source.whole(name))
    return decoder.eval()


def text_of(given: argparse.Namespace, parent: "HfFolder", tokens: int) -> "Tensor":
    """Sequences of real text."""
    from tools.upcycling.text import sequences, tokenizer_of

    tokenizer = tokenizer_of(given.hf, given.tokenizer, parent.model.vocab_size)
    return sequences(given.text, tokenizer, tokens, min(given.seq_length, tokens))


if __name__ == "__main__":
    sys.exit(main())
