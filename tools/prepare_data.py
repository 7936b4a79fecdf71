#!/usr/bin/env python3
"""Turns text files into token shards for training: see moe_engine/prepare/pipeline.py.

python tools/prepare_data.py --input book.txt notes/ --out data/mine
python tools/prepare_data.py --domain web=web.jsonl.gz --domain code=src/ --tokenizer tokenizer.model --out data/mix
python tools/prepare_data.py --stdlib --out data/python
python tools/prepare_data.py samples --input alpaca.json --tokenizer FOLDER --out data/sft      rows, with masks
python tools/prepare_data.py preview --input alpaca.json --tokenizer FOLDER                     rows, shown
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moe_engine.config.command_line import Parser
from moe_engine.errors import ConfigError, EngineError
from moe_engine.host.console import failed, run_program
from moe_engine.prepare.pipeline import PrepareOptions, prepare, stdlib_sources
from moe_engine.text import printable
from tools.data import samples

SHOWN = 8  # endings, or files met again


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        description="Turn .txt .md .py .jsonl .json .parquet files (also .gz, .zst) and folders into token shards.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = parser.add_argument_group("what to read")
    what.add_argument(
        "--input", nargs="+", default=[], metavar="PATH", help="files and folders of one domain, called 'data'"
    )
    what.add_argument("--domain", action="append", default=[], metavar="NAME=PATH", help="one domain; repeat for more")
    what.add_argument(
        "--stdlib", action="store_true", help="the Python standard library's own sources, as domain 'stdlib'"
    )
    what.add_argument(
        "--text-key", metavar="FIELD", help="field that holds the text of a row; default: the first of text, content..."
    )
    what.add_argument(
        "--per", choices=("file", "line"), default="file", help="a plain text file is one document, or one a line"
    )
    what.add_argument("--on-bad-row", choices=("stop", "skip"), default="stop", help="skip reports, counts and goes on")
    how = parser.add_argument_group("how to write")
    how.add_argument("--out", required=True, metavar="FOLDER", help="where the shards go")
    how.add_argument(
        "--tokenizer", default="bytes", metavar="SPEC", help="'bytes', a .model file, or a folder with tokenizer.json"
    )
    how.add_argument("--add-bos", action="store_true", help="begin each document with the tokenizer's begin-of-text id")
    how.add_argument("--eval-fraction", type=float, default=0.01, help="share of the documents that is held out")
    how.add_argument("--shard-tokens", type=int, default=PrepareOptions.shard_tokens, help="tokens in one file")
    how.add_argument("--workers", type=int, help="processes; default: one a core, or one alone for little data")
    how.add_argument("--overwrite", action="store_true", help="replace prepared data that was made otherwise")
    how.add_argument("--quiet", action="store_true", help="no progress")
    return parser.parse_args(argv)


def domains_of(args: argparse.Namespace) -> dict[str, list[str | Path]]:
    """The files of every domain, as the user named them."""
    domains: dict[str, list[str | Path]] = {}
    if args.input:
        domains["data"] = list(args.input)
    if args.stdlib:
        domains["stdlib"] = list(stdlib_sources())
    for text in args.domain:
        name, equals, path = text.partition("=")
        if not equals or not path or not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"--domain {text}: expected NAME=PATH, with a name of letters, digits, - and _")
        domains.setdefault(name, []).append(path)
    if not domains:
        raise ConfigError("nothing to read: give --input PATH, --domain NAME=PATH or --stdlib")
    return domains


def notes_on(domain: dict[str, Any]) -> Iterator[str]:
    """What the inputs of a domain hold beside what was read from them, in a line or two however much it is."""
    if over := domain["passed_over"]:
        common = sorted(over.items(), key=lambda item: -item[1])
        shown = [f"{count:,} {ending}" for ending, count in common[:SHOWN]] + ["others"] * (len(common) > SHOWN)
        yield f"not read in folders: {sum(over.values()):,} entries ({', '.join(shown)})"
    if again := domain["met_again"]:
        shown = [f"{path} is {first}" for path, first in again[:SHOWN]] + ["others"] * (len(again) > SHOWN)
        yield f"met again and read once: {', '.join(shown)}"


def main(argv: list[str]) -> int:
    """Exit code: 0, 65 for data that cannot be used, 78 for arguments that cannot work."""
    try:
        if argv[:1] in (["samples"], ["preview"]):
            return samples.main(argv)
        args = parse(argv)
        options = PrepareOptions(
            args.text_key, args.per, args.add_bos, args.eval_fraction, args.on_bad_row, args.shard_tokens
        )
        manifest = prepare(
            domains_of(args), args.out, args.tokenizer, options, args.workers, args.overwrite, args.quiet
        )
    except EngineError as error:
        return failed(error)
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    for name, domain in manifest["domains"].items():
        counts = [
            f"{split}: {entry['tokens']:,} tokens in {entry['documents']:,} documents"
            for split, entry in domain["splits"].items()
        ]
        rows = (
            f"{domain['rows_read']:,} rows read: {domain['documents_kept']:,} kept, {domain['empty_documents']:,} "
            f"empty, {domain['bad_rows']:,} bad rows"
        )
        print(f"{name}: {'; '.join(counts)}; {rows}")
        for note in notes_on(domain):
            print(f"{name}: {printable(note)}")
    tokenizer = manifest["tokenizer"]
    for note in tokenizer["notes"]:
        print(f"warning: {printable(note)}", file=sys.stderr)
    begins = f", begin of text: id {manifest['bos_id']}" if tokenizer["add_bos"] else ""
    print(f"end of text: {printable(tokenizer['eos_token'])} = {manifest['eos_id']}{begins}")
    kind = tokenizer["kind"]
    print(f"{printable(args.out)}: {manifest['tokens']:,} tokens, vocabulary {manifest['vocab_size']:,} ({kind})")
    return 0


if __name__ == "__main__":
    run_program(lambda: main(sys.argv[1:]))
