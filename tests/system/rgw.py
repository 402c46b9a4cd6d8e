"""A real S3 server on loopback: Ceph's RADOS gateway with one monitor and one disk daemon, all of it in one folder.

Each daemon is a child of this process that `stop` ends. Ports are free ones, so that several can run side by side;
the disk daemon takes the first free ports from 6800 on by itself. No authentication inside, keys outside: who talks S3
needs the generated ones. Called by `conftest` only.
"""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.store import S3Store

BINARIES = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool")
REGION = "us-east-1"

_CONFIGURATION = """
[global]
fsid = {fsid}
mon_host = {monitor}
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
# without authentication there is no key to encrypt with
ms_mon_client_mode = crc
# one copy of everything, in few pieces
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_crush_chooseleaf_type = 0
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 500
mon_data_avail_crit = 1
# the one monitor has no others to wait for
paxos_propose_interval = 0.01
paxos_min_wait = 0.01
bluestore_block_size = 10737418240
osd_memory_target = 939524096
keyring = {folder}/keyring
admin_socket = {folder}/$name.asok
log_file = {folder}/$name.log
mon_data = {folder}/monitor
osd_data = {folder}/disk
run_dir = {folder}
[client.rgw.a]
# without tcp_nodelay every small answer takes 40 ms
rgw_frontends = beast endpoint=127.0.0.1:{gateway_port} tcp_nodelay=1
rgw_thread_pool_size = 32
rgw_run_sync_thread = false
rgw_enable_lc_threads = false
"""


class Gateway:
    """The server; `environment` is what a client of it needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._configuration = folder / "ceph.conf"
        self._monitor = f"v2:127.0.0.1:{_free_port()}"
        gateway_port = _free_port()
        self._fsid = str(uuid.uuid4())
        self._configuration.write_text(
            _CONFIGURATION.format(fsid=self._fsid, folder=folder, monitor=self._monitor, gateway_port=gateway_port)
        )
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._gateway: subprocess.Popen[bytes] | None = None
        self.environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{gateway_port}", "AWS_REGION": REGION}

    def start(self) -> None:
        """Make an empty cluster and a user, and start it."""
        self._start_monitor()
        self._start_disk()
        user = json.loads(self._run("radosgw-admin", "user", "create", "--uid=tests", "--display-name=tests"))
        (keys,) = user["keys"]
        self.environment |= {"AWS_ACCESS_KEY_ID": keys["access_key"], "AWS_SECRET_ACCESS_KEY": keys["secret_key"]}
        self.start_gateway()

    def start_gateway(self) -> None:
        """Start what speaks S3, again after `kill_gateway`."""
        self._gateway = self._spawn("radosgw", "-n", "client.rgw.a")
        self._wait("the gateway", self._answers)

    def kill_gateway(self) -> None:
        """SIGKILL what speaks S3, and only that."""
        assert self._gateway is not None
        self._gateway.kill()
        self._gateway.wait()

    def create_bucket(self, name: str) -> None:
        """Create a bucket of the user."""
        store = S3Store(
            name,
            access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            endpoint=self.environment["AWS_ENDPOINT_URL"],
            region=REGION,
            client_options={"allow_http": True},
        )
        signed = obstore.sign(store, "PUT", "", timedelta(minutes=1))
        with urllib.request.urlopen(urllib.request.Request(signed, method="PUT"), timeout=60):
            pass

    def stop(self) -> None:
        """End every daemon and delete what it stored; the logs stay."""
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        shutil.rmtree(self.folder / "disk", ignore_errors=True)

    def _start_monitor(self) -> None:
        keyring, map_file = f"{self.folder}/keyring", f"{self.folder}/monmap"
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        self._run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", f"[{self._monitor}]", map_file)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", map_file)
        self._spawn("ceph-mon", "-i", "a")

    def _start_disk(self) -> None:
        disk_id = str(uuid.uuid4())
        self._run("ceph", "osd", "new", disk_id)
        (self.folder / "disk").mkdir()
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk_id)
        self._spawn("ceph-osd", "-i", "0")
        # a gateway that comes before the disk sleeps for ten seconds
        self._wait("the disk", lambda: bool(json.loads(self._run("ceph", "osd", "stat", "-f", "json"))["num_up_osds"]))

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.environment["AWS_ENDPOINT_URL"], timeout=5):
                return True
        except OSError:
            return False

    def _run(self, *command: str) -> str:
        with (self.folder / "commands.log").open("a") as log:
            print(*command, file=log, flush=True)
            return subprocess.run(
                [*command, "--conf", self._configuration],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                check=True,
                timeout=120,
            ).stdout

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / "daemons.log").open("a") as log:
            daemon = subprocess.Popen([*command, "--foreground", "--conf", self._configuration], stdout=log, stderr=log)
        self._daemons.append(daemon)
        return daemon

    def _wait(self, what: str, is_up: Callable[[], bool], timeout_seconds: float = 60.0) -> None:
        give_up = time.monotonic() + timeout_seconds
        while not is_up():
            if time.monotonic() > give_up or self._daemons[-1].poll() is not None:
                raise RuntimeError(f"{what} did not start: see {self.folder}")
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
