"""A PostgreSQL server of the test's own, which it may stop and start."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from processes import free_port

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


class Postgres:
    """A server on this machine alone, without a password, in a folder of its own; it ends with the block."""

    def __enter__(self) -> Self:
        if not BINARIES:
            pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
        self.folder, self.port = Path(tempfile.mkdtemp()), free_port()
        self.switch: Any = {}
        if os.getuid() == 0:  # as which the server refuses to run
            self.switch = {"user": "postgres"}
            shutil.chown(self.folder, "postgres")
        self._run("initdb", "-U", "fffexp", "-A", "trust", "-N")
        self.ctl("start")
        self.url = f"postgresql+psycopg://fffexp@127.0.0.1:{self.port}/postgres"
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.ctl("stop", "-m", "immediate")
        shutil.rmtree(self.folder)

    def _run(self, program: str, *args: str) -> None:
        command = [str(BINARIES[-1] / program), "-D", str(self.folder / "data"), *args]
        # not into a pipe, which the server would keep open
        subprocess.run(command, check=True, cwd=self.folder, stdout=subprocess.DEVNULL, timeout=120, **self.switch)

    def ctl(self, action: str, *args: str) -> None:
        """`pg_ctl start`, `stop` or `restart`, which returns when that is done."""
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        self._run("pg_ctl", action, "-w", "-l", str(self.folder / "log"), "-o", options, *args)
