"""Processes that take part in a measurement: started by module name, spoken to in lines of JSON, ended with us."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from ..types import CoordinatorError


class Peer:
    """One process. Its first line of JSON is `greeting`; it ends when its stdin does."""

    def __init__(
        self, module: str, *arguments: str, environment: dict[str, str] | None = None, prefix: Sequence[str] = ()
    ) -> None:
        """`prefix`: words before the command. Raises CoordinatorError when the process ends instead of greeting."""
        self._module = module
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            self.greeting: Any = self._read()
        except BaseException:
            self.end()
            raise

    def ask(self, question: Any) -> Any:
        """Sends one line and waits for the answer. Raises CoordinatorError when the process has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # reading says so
        return self._read()

    def end(self) -> None:
        """Waits until the process is gone."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CoordinatorError(f"A process of the measurement ended: {self._module}; its message is above.")
        return json.loads(line)
