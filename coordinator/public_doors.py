"""The two doors for clients, with the certificate that they show when others than this machine can reach them."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from moehive.proto.channel import COORDINATOR_NAME, Identity

from .cluster.keys import check_key, list_keys
from .cluster.store import Store
from .cluster.trust import Authority
from .serving.doors import Tls, is_loopback
from .serving.generation import GenerationService
from .serving.grpc_api import GrpcDoor, serve_grpc
from .serving.http import HttpDoor, serve_http
from .serving.journal import Journal
from .serving.openai import openai_app
from .settings import CoordinatorSettings
from .types import CoordinatorError

log = logging.getLogger(__name__)

RENEWAL_CHECK_SECONDS = 3600.0  # between looks at whether the certificate should be replaced


class PublicDoors:
    """gRPC and HTTP, open on loopback, elsewhere with TLS and API keys. `start`, then `stop`, on one event loop."""

    def __init__(self, settings: CoordinatorSettings, store: Store, authority: Authority) -> None:
        """Raises CoordinatorError when others could come in and there is no key yet: before minutes of loading."""
        self.grpc_port = self.http_port = 0
        self._settings = settings
        self._store = store
        self._authority = authority
        self._cleanup = contextlib.AsyncExitStack()
        self._shut = not is_loopback(settings.host)
        if self._shut and all(key.revoked is not None for key in list_keys(store)):
            raise CoordinatorError(
                f"{settings.host} can be reached from other machines, and there is no API key yet: make one with "
                "`moehive key new NAME`, or listen on 127.0.0.1."
            )

    async def start(self, service: GenerationService) -> None:
        """Serves. Raises OSError with a sentence for a port in use."""
        settings = self._settings
        tls, may_enter = None, None
        if self._shut:
            identity = self._authority.renewing(self._issue)
            tls = await asyncio.to_thread(self._write, identity())

            def may_enter(key: str) -> bool:
                return check_key(self._store, key) is not None

        journal = await asyncio.to_thread(Journal, settings.state_dir / "journal")
        grpc_door: GrpcDoor = await serve_grpc(settings.host, settings.grpc_port, service, tls, may_enter, journal)
        self._cleanup.push_async_callback(grpc_door.stop)
        self.grpc_port = grpc_door.port
        app = openai_app(service, may_enter)
        http_door: HttpDoor = await serve_http(settings.host, settings.http_port, app, tls, may_enter)
        self._cleanup.push_async_callback(http_door.stop)
        self.http_port = http_door.port
        if self._shut:
            renewing = asyncio.create_task(self._renew(identity, http_door))
            self._cleanup.callback(renewing.cancel)

    async def stop(self) -> None:
        """Closes both."""
        await self._cleanup.aclose()

    async def _renew(self, identity: Callable[[], Identity], http_door: HttpDoor) -> None:
        """Writes the certificate again when it has been replaced; gRPC reads the files at each handshake."""
        written = identity()
        while True:
            await asyncio.sleep(RENEWAL_CHECK_SECONDS)
            current = identity()
            if current is not written:
                try:
                    http_door.show(await asyncio.to_thread(self._write, current))
                    written = current
                except OSError as error:
                    log.error("The doors' new certificate can't be written: %s; free space on that disk.", error)

    def _issue(self) -> Identity:
        """Good for the names by which clients may reach this machine."""
        settings = self._settings
        # Our own client knows the coordinator by name, others by the address that they dial.
        hosts = [COORDINATOR_NAME, settings.cluster_advertise, "localhost", "127.0.0.1"]
        if settings.host not in ("0.0.0.0", "::"):
            hosts.append(settings.host)
        return self._authority.issue_server(list(dict.fromkeys(hosts)))

    def _write(self, identity: Identity) -> Tls:
        folder: Path = self._settings.state_dir / "door"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tls = Tls(folder / "chain.pem", folder / "key.pem")
        for file, data in ((tls.chain_file, identity.chain_pem), (tls.key_file, identity.key_pem)):
            beside = file.with_suffix(".new")
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(descriptor)
            beside.replace(file)
        return tls
