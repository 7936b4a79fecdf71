"""prepare_data.py samples and preview: rows of instructions and conversations to token shards, or shown."""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

from moe_engine.config import Run
from moe_engine.config.command_line import Parser
from moe_engine.config.files import read_model
from moe_engine.config.messages import refuse, validation_problems
from moe_engine.config.samples import Samples
from moe_engine.errors import ConfigError, DataError

FLAGS = ("mixture", "mode", "format", "columns", "template", "train_on", "max_prompt", "max_response", "max_samples")


def parse(argv: list[str]) -> argparse.Namespace:
    about = "Turn rows of instructions, conversations or preferences into token shards with masks, or show them."
    parser = Parser(prog="prepare_data.py", description=about, argument_default=argparse.SUPPRESS)
    parser.add_argument("what", choices=("samples", "preview"))
    parser.add_argument("--input", nargs="+", metavar="PATH", dest="files", help="files and folders of rows")
    for key in FLAGS:
        placeholder, text = Samples.settings()[key].flag or ("", "")
        parser.add_argument(f"--{key.replace('_', '-')}", metavar=placeholder, help=text)
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="a tokenizer, or a folder with one")
    parser.add_argument("--max-length", type=int, default=1024, metavar="N", help="tokens of a sample (1024)")
    parser.add_argument("--eval-fraction", type=float, metavar="X", help="share that is held out (0.05)")
    parser.add_argument("--on-bad-row", metavar="stop|skip", help="skip reports, counts and goes on")
    parser.add_argument("--out", metavar="FOLDER", help="of samples: where the shards go")
    parser.add_argument("--overwrite", action="store_true", default=False, help="replace what was prepared otherwise")
    parser.add_argument("--workers", type=int, default=None, metavar="N", help="processes")
    parser.add_argument("--quiet", action="store_true", default=False, help="no progress")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="of preview: samples of each source (3)")
    parser.add_argument("--json", action="store_true", default=False, help="of preview: one JSON object a sample")
    return parser.parse_args(argv)


def run_of(args: argparse.Namespace) -> Run:
    """The settings of the samples, as a run has them."""
    from pydantic import ValidationError

    given = {key: value for key, value in vars(args).items() if key in Samples.model_fields}
    if not given.keys() & {"files", "mixture"}:
        raise ConfigError("nothing to read: give --input PATH or --mixture FILE")
    train = {"seq_length": args.max_length}
    try:
        return Run.model_validate({"model": read_model("tiny"), "samples": given, "train": train})
    except ValidationError as error:
        refuse(line for lines in validation_problems(error, {}).values() for line in lines)


def main(argv: list[str]) -> int:
    """Prepare or show; the exit code."""
    from moe_engine.prepare.run_samples import described, mixture_lines
    from moe_engine.prepare.sample_shards import prepare_samples

    args = parse(argv)
    sources, options = described(run_of(args))
    if args.what == "preview":
        return preview(args, sources, options)
    if "out" not in args:
        raise ConfigError("--out: not given, expected the folder that the shards go to")
    manifest = prepare_samples(
        sources, Path(args.out), args.tokenizer, options, args.workers, args.overwrite, args.quiet
    )
    print(*mixture_lines(manifest), sep="\n")
    for note in manifest["tokenizer"]["notes"]:
        print(f"warning: {note}", file=sys.stderr)
    return 0


def preview(args: argparse.Namespace, sources: dict, options: object) -> int:
    """The first samples of each source, and counts of all that was looked at."""
    from moe_engine.prepare.fitting import Limits, fitted
    from moe_engine.prepare.formats import BadRow
    from moe_engine.prepare.preview import Preview, as_json, lines_of
    from moe_engine.prepare.sample_shards import SampleOptions
    from moe_engine.prepare.samples import read_samples
    from moe_engine.prepare.template import Template
    from moe_engine.prepare.tokenizer.load import load_tokenizer

    assert isinstance(options, SampleOptions)
    template = Template(load_tokenizer(args.tokenizer), options.template)
    limits = Limits(options.max_length, options.max_prompt, options.max_response)
    for name, source in sources.items():
        samples = read_samples(source.paths, source.format, source.columns)
        if not args.json:
            print(f"{name}: {samples.format} format")
        for found in islice(samples, args.rows):
            if isinstance(found, BadRow):
                print(f"bad row {found}", file=sys.stderr)
                continue
            try:
                halves = fitted(template, found, options.train_on, limits)
            except DataError as error:
                raise DataError(f"{found.where}: {error}") from None
            shown = Preview(found.where, halves, found.label or source.expert_label)
            if args.json:
                print(json.dumps({"source": name, **as_json(template, shown)}, ensure_ascii=False))
            else:
                print(*lines_of(template, shown, sys.stdout.isatty()), sep="\n")
    return 0
