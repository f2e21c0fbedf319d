"""`reverie push`: a finished run on the Hugging Face Hub."""

from pathlib import Path

from reverie.cli._output import say, say_table
from reverie.cli._runs import check_intact, exported_files, packed_file
from reverie.errors import ConfigError

# Sets of real images that a report may show, by what they were given as.
_REAL = ("calibration", "evaluation", "unlabelled")


def push(
    run: Path,
    repository: str,
    /,
    *,
    public: bool = False,
    with_report: bool = False,
    with_real_images: bool = False,
    dry_run: bool = False,
) -> None:
    """Put a run's model card, network.safetensors, exported files and recipe into a repository of the Hugging Face Hub.

    A new repository is private. Images stay where they are, synthetic ones too. Needs the extra `models` and a token (`hf auth login`, or
    HF_TOKEN).

    Example: reverie push runs/embedded-digits-w4a8 me/digits-w4a8 --dry-run

    Example: reverie push runs/embedded-digits-w4a8 me/digits-w4a8 --public

    Args:
        run: A run directory that `reverie quantize` completed.
        repository: OWNER/NAME; made if there is none.
        public: Let everybody read it.
        with_report: Put report.html there, too. It shows images.
        with_real_images: Do so even though the run was given real images, which the report may show.
        dry_run: Only list what would go up.
    """
    files = _files(run, with_report=with_report, with_real_images=with_real_images)
    if dry_run:
        _list(files, repository, public=public)
        return
    from reverie.publishing import upload

    say(f"{upload(files, repository, public=public, message='Reverie: a quantized network')}: {len(files)} files")


def _files(run: Path, *, with_report: bool, with_real_images: bool) -> list[Path]:
    """What goes up of a complete run."""
    from reverie.runs import read_record
    from reverie.runtimes import parts

    packed = packed_file(run)
    exported = [part for file in exported_files(run) for part in parts(file)] if any(run.glob("network.[!s]*")) else []
    files = [run / "README.md", packed, *exported, run / "recipe.toml"]
    if with_report:
        real = [name for name in _REAL if read_record(run)["identity"].get(name, "none") != "none"]
        if real and not with_real_images:
            raise ConfigError(
                f"{run}: --with-report must be of a run without real images, got one that was given some ({', '.join(real)}), which the report may "
                "show; leave it out, or say --with-real-images"
            )
        files.append(run / "report.html")
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{run}: must hold {file.name}, got none; run `reverie quantize` again with a new --output")
    # The card is the owner's to change.
    check_intact(run, *files[1:])
    return files


def _list(files: list[Path], repository: str, *, public: bool) -> None:
    from reverie.report.outcome import size_text

    say_table(("file", "size"), [(file.name, size_text(file.stat().st_size)) for file in files], numbers=(1,))
    total = size_text(sum(file.stat().st_size for file in files))
    say(f"{len(files)} files, {total}, would go to {repository}, {'which everybody may read' if public else 'private'}")
