"""What a Hugging Face folder holds beside weights, kept byte for byte from the first folder to the last.

An imported checkpoint has these files among its own; a run that starts from such a folder keeps them in OUT/hf.
"""

from pathlib import Path

from moe_engine.checkpoint import disk
from moe_engine.checkpoint.hf.folder import CONFIG, blob_of
from moe_engine.checkpoint.hf.tokenizer_files import with_tokenizer
from moe_engine.host.files import size_in

NAMES = (
    *(CONFIG, "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md"),
)
CODE = ("configuration_*.py", "modeling_*.py")  # what auto_map names; it is copied and never run
MAX_BYTES = 1 << 28  # a tokenizer has tens of megabytes
OF_A_RUN = "hf"  # the folder of a run that holds them


def side_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder that go along with its weights; a link of the hub's cache is read as what it leads to."""
    out = {}
    code = sorted(path.name for pattern in CODE for path in folder.glob(pattern))
    for name in (*NAMES, *code):
        path = folder / name
        real = blob_of(folder, path) or path
        size = size_in(real.parent, real)
        if size is not None and size <= MAX_BYTES:
            out[name] = real.read_bytes()
    return out


def keep_for_run(source: Path | None, out: Path, tokenizer: Path, instead: bool = False) -> None:
    """Copy them to OUT/hf, so that every checkpoint of the run can be exported with them; None: there are none.

    tokenizer: the folder of the data's; its files go along where the source has none, or `instead` of its own.
    """
    files = with_tokenizer(of_checkpoint(source) if source else {}, tokenizer, instead)
    disk.remove(out / OF_A_RUN)  # of an earlier start
    if not files:
        return
    disk.make_folder(out / OF_A_RUN)
    for name, content in files.items():
        disk.write_file(out / OF_A_RUN / name, [content])


def of_checkpoint(folder: Path) -> dict[str, bytes]:
    """The side files of a checkpoint: its own, or those that its run keeps; none for a run that began from nothing."""
    own = side_files(folder)
    return own or side_files(folder.resolve().parent.parent / OF_A_RUN)
