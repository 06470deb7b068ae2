"""The folder of a sweep that another process can continue.

| file | what |
|---|---|
| ``sweep.yaml`` | the sweep as it was started, with what was given beside the file |
| ``history.sqlite3``, ``logs``, ``bills``, ``objects`` | the fleet |
| ``study.log`` | Optuna's journal of the study |
| ``report`` | what is written at the end |
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from smlt_tune.backend.sweeps.sweep import Sweep, load
from smlt_tune.errors import InvalidInput


@dataclass(frozen=True)
class Folder:
    """Places in the folder of a sweep."""

    path: Path

    @property
    def file(self) -> Path:
        """The sweep as it was started."""
        return self.path / "sweep.yaml"

    @property
    def journal(self) -> Path:
        """Of the study."""
        return self.path / "study.log"

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.path / "report"

    @property
    def has_fleet(self) -> bool:
        """Whether a client has come as far as to open a fleet."""
        return (self.path / "history.sqlite3").exists()

    def keep(self, sweep: Sweep) -> None:
        """Writes down what is about to start.

        Raises:
            InvalidInput: There is a sweep or a fleet in the folder, or it cannot be used.
        """
        if self.file.exists():
            raise InvalidInput(
                f"there is a sweep in {self.path}: smlt resume {self.path} goes on with it; for "
                "another one choose another folder"
            )
        if self.has_fleet:
            raise InvalidInput(f"there is a fleet in {self.path}: choose another folder")
        content = {**sweep.document, "name": sweep.name}
        if sweep.project is not None:
            content["project"] = str(sweep.project.resolve())
        place, _, function = sweep.train_name.partition(":")
        if place.endswith(".py"):
            content["train"] = f"{(sweep.path.parent / place).resolve()}:{function}"
        text = "# Written by smlt sweep; smlt resume continues it.\n" + yaml.safe_dump(
            content, sort_keys=False, allow_unicode=True
        )
        half = self.file.with_name(f"{self.file.name}.half")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            half.write_text(text, encoding="utf-8")
            half.replace(self.file)  # all of it or nothing, whenever this process dies
        except OSError as error:
            raise InvalidInput(f"cannot use the folder {self.path}: {error.strerror}") from error

    def sweep(self) -> Sweep:
        """The sweep that was started here.

        Raises:
            InvalidInput: There is none, or its training function cannot be loaded any more.
        """
        if not self.file.exists():
            raise InvalidInput(
                f"there is no sweep in {self.path}: smlt sweep FILE --path {self.path} starts one"
            )
        return load(self.file)

    def metric(self) -> tuple[str, str]:
        """What its trials are compared by, and ``max`` or ``min``; empty if there is no sweep."""
        if not self.file.exists():
            return "", ""
        content = yaml.safe_load(self.file.read_text(encoding="utf-8"))
        minimize = content.get("direction") == "minimize"
        return content["metric"], "min" if minimize else "max"
