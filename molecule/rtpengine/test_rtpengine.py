"""The module was built in this guest for its kernels, and media goes through the kernel: by every sign there is."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any, Self

import pytest
from guests import Guest, Host, inventory_of, secret

from voip_stack import inventory, lab
from voip_stack.calls.probes import Metrics, parse_metrics
from voip_stack.deadline import Deadline

INTERNAL = inventory_of("rtpengine-1")["internal_address"]
EXTERNAL = inventory_of("rtpengine-1")["external_address"]
PHONE = str(inventory.load().phones[-1])
PBX = str(inventory.load().networks["internal"].computer)
RTP = Path(__file__).with_name("rtp.py")
SECONDS = 10  # of media: the daemon hands a stream to the kernel about 3 s after its first packet
PACKETS = SECONDS * 50
GAP = 12  # seconds of silence, at the most, from the daemon's death until media flows again
SECRETS = "/etc/rtpengine/secrets.env"


def ng(command: str, **values: object) -> dict[str, Any]:
    """An answer of the ng protocol, which takes JSON in place of bencode.

    https://rtpengine.readthedocs.io/en/latest/ng_control_protocol.html
    """
    cookie = uuid.uuid4().hex
    with lab.current().open_socket(socket.SOCK_DGRAM) as control:
        control.settimeout(10)
        control.connect((INTERNAL, 2223))
        control.send(f"{cookie} {json.dumps({'command': command, **values})}".encode())
        said, _, answer = control.recv(65535).decode().partition(" ")
    assert said == cookie
    told: dict[str, Any] = json.loads(answer)
    return told


def sdp(address: str, port: int) -> str:
    lines = ["v=0", f"o=- 1 1 IN IP4 {address}", "s=-", f"c=IN IP4 {address}", "t=0 0", f"m=audio {port} RTP/AVP 0"]
    return "\r\n".join([*lines, "a=sendrecv", ""])


def media_of(text: str) -> tuple[str, str]:
    """Where an SDP says that media goes to."""
    return re.findall(r"c=IN IP4 (\S+)", text)[0], re.findall(r"m=audio (\d+)", text)[0]


def metrics() -> Metrics:
    page = http.client.HTTPConnection(INTERNAL, 2225)
    page.sock = lab.current().connect(INTERNAL, 2225, timeout=10)
    page.request("GET", "/metrics")
    return parse_metrics(page.getresponse().read().decode())


def table(host: Host) -> dict[str, int]:
    """Packets that the kernel has forwarded, by entry of its table (which names the local port)."""
    text = host.check_output("cat /proc/rtpengine/0/list")
    entries = re.split(r"^local inet4 ", text, flags=re.MULTILINE)[1:]
    return {e.split()[0]: sum(map(int, re.findall(r"stats: .*?(\d+) packets", e))) for e in entries}


@pytest.fixture(scope="module")
def kernels(host: Host) -> tuple[str, list[str]]:
    """The running kernel, and the other one."""
    return host.check_output("uname -r"), sorted(host.check_output("ls /boot | sed -n s/^vmlinuz-//p").split())


def test_dkms_has_built_the_module_for_every_kernel(host: Host, kernels: tuple[str, list[str]]) -> None:
    running, installed = kernels
    assert running in installed
    assert len(installed) > 1, "the scenario has installed a second one"
    built = {line.split(", ")[1] for line in host.check_output("dkms status").splitlines() if ": installed" in line}
    assert built == set(installed)


def test_the_module_that_runs_was_built_here(host: Host, kernels: tuple[str, list[str]]) -> None:
    """It is the file that DKMS has put there, of which this guest has the build's log, and no package's."""
    name = host.check_output("sed -n 's/ .*//p' /proc/modules | grep -iE '^(xt|nft)_rtpengine$'")
    file = host.check_output("modinfo --field filename %s", name)
    assert f"/lib/modules/{kernels[0]}/updates/dkms/{name}.ko" in file
    assert host.run("dpkg --search %s", file).rc != 0, "a package brought it"
    assert host.check_output("find /var/lib/dkms/rtpengine -path %s", f"*/{kernels[0]}/*/log/make.log")
    same = """
import lzma, pathlib, sys
note = pathlib.Path("/sys/module", sys.argv[1], "notes/.note.gnu.build-id").read_bytes()
sys.exit(note not in lzma.open(sys.argv[2]).read())
"""
    assert host.run("python3 -c %s %s %s", same, name, file).rc == 0, "the module in memory is another one"


class Session:
    """A session that both ends send media through, from outside and from inside, for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.names = {"call-id": uuid.uuid4().hex, "from-tag": "a"}
        flags = {"replace": ["origin", "session-connection"], "ICE": "remove"}
        # The side that a message comes from is named first.
        offer = ng("offer", sdp=sdp(PHONE, 6000), direction=["external", "internal"], **self.names, **flags)
        assert offer["result"] == "ok", offer
        self.names["to-tag"] = "b"
        answer = ng("answer", sdp=sdp(PBX, 7000), direction=["internal", "external"], **self.names, **flags)
        assert answer["result"] == "ok", answer
        self.told = {"inside": media_of(offer["sdp"]), "outside": media_of(answer["sdp"])}
        ends = {
            "outside": lab.current().outside("python3", str(RTP), PHONE, "6000", *self.told["outside"], str(seconds)),
            "inside": lab.current().inside("python3", str(RTP), PBX, "7000", *self.told["inside"], str(seconds)),
        }
        self.ends = {end: subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for end, argv in ends.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ends.values():
            process.kill()
            process.wait()
            assert process.stdout
            process.stdout.close()

    def hang_up(self) -> None:
        for process in self.ends.values():
            process.terminate()

    def counts(self) -> dict[str, dict[str, Any]]:
        return {end: json.loads(process.communicate(timeout=60)[0]) for end, process in self.ends.items()}


def release(session: Session) -> None:
    """End a session, which RTPEngine must still know: else it answers "ok" with a warning."""
    answer = ng("delete", **session.names)
    assert answer["result"] == "ok"
    assert "warning" not in answer, answer


@pytest.fixture(scope="module")
def call(host: Host) -> dict[str, Any]:
    """A session, watched until its end."""
    since = host.check_output("date +%s")
    with Session(SECONDS) as session:
        seen: dict[str, Any] = {**session.told}
        time.sleep(5)
        seen["metrics"], seen["table"] = [metrics()], [table(host)]
        seen["query"] = ng("query", **session.names)
        time.sleep(2)
        seen["metrics"].append(metrics())
        seen["table"].append(table(host))
        seen["counts"] = session.counts()
    seen["journal"] = host.check_output("journalctl --no-pager -o cat -u rtpengine-daemon --since @%s", since)
    seen["delete"] = ng("delete", **session.names)
    return seen


def test_each_side_is_told_the_address_of_its_own_network(call: dict[str, Any]) -> None:
    assert call["outside"][0] == EXTERNAL
    assert call["inside"][0] == INTERNAL


def test_all_packets_arrive_both_ways(call: dict[str, Any]) -> None:
    for end in ("outside", "inside"):
        assert call["counts"][end]["sent"] == PACKETS
        assert call["counts"][end]["received"] >= 0.98 * PACKETS, end


def test_the_kernel_forwards_both_streams(call: dict[str, Any]) -> None:
    before, after = call["metrics"]
    assert after.kernel_streams == 2
    kernel = after.kernel_packets - before.kernel_packets
    userspace = after.userspace_packets - before.userspace_packets
    assert kernel >= 100, "two streams of 50 packets a second, for two seconds at least"
    assert userspace <= 0.1 * kernel


def test_the_modules_own_table_counts_them(call: dict[str, Any]) -> None:
    before, after = call["table"]
    assert {f"{address}:{port}" for address, port in (call["outside"], call["inside"])} <= set(after)
    for entry in (f"{address}:{port}" for address, port in (call["outside"], call["inside"])):
        assert after[entry] > before[entry] + 50, entry


def test_ng_says_that_the_streams_are_in_the_kernel(call: dict[str, Any]) -> None:
    streams = [s for tag in call["query"]["tags"].values() for m in tag["medias"] for s in m["streams"]]
    media = [s for s in streams if "RTP" in s["flags"] and "RTCP" not in s["flags"]] or streams
    kernelized = [s for s in media if "kernelized" in s["flags"]]
    assert len(kernelized) == 2, media
    assert all(s["last kernel packet"] > 0 for s in kernelized)


def test_the_rule_and_the_journal_agree(host: Host, call: dict[str, Any]) -> None:
    assert host.run("rtpengine --config-file=/etc/rtpengine/rtpengine.conf --nftables-status").rc == 0
    assert call["journal"].count("Kernelizing media stream") >= 2


def test_a_released_session_leaves_nothing(host: Host, call: dict[str, Any]) -> None:
    assert call["delete"]["result"] == "ok"
    assert metrics().sessions == 0
    assert table(host) == {}


@pytest.mark.outage
@pytest.mark.parametrize("command", ["kill --signal=KILL", "restart"])
def test_a_session_survives_the_daemon(host: Host, command: str) -> None:
    """Away in the middle of a call, it takes the session up again from Redis, and the kernel forwards again."""

    def forwarded() -> bool:
        try:
            return metrics().kernel_streams == 2
        except OSError:  # not there yet
            return False

    with Session(120) as session:
        time.sleep(6)
        host.check_output(f"systemctl {command} rtpengine-daemon")
        time.sleep(2)
        assert Deadline(60).until(forwarded), metrics()
        before = metrics()
        time.sleep(2)
        after = metrics()
        session.hang_up()
        counts = session.counts()
    release(session)
    assert after.kernel_packets - before.kernel_packets >= 100
    for end, count in counts.items():
        assert count["gap"] < GAP, end
        assert count["received"] >= count["sent"] - GAP * 50, end


@pytest.mark.outage
def test_without_redis_it_starts_and_there_are_calls(host: Host, guest: Guest) -> None:
    guest("redis-1").check_output("systemctl stop redis-server")
    try:
        host.check_output("systemctl restart rtpengine-daemon")
        with Session(2) as session:
            counts = session.counts()
        release(session)
        assert all(count["received"] >= 90 for count in counts.values()), counts
    finally:
        guest("redis-1").check_output("systemctl start redis-server")


@pytest.mark.outage
def test_a_redis_that_hangs_delays_one_call(guest: Guest) -> None:
    """Twice, since the first finds out: the second one is not delayed."""
    pid = guest("redis-1").check_output("systemctl show --value --property=MainPID redis-server")
    guest("redis-1").check_output(f"kill -STOP {pid}")
    try:
        seconds = []
        for _ in range(2):
            begin = time.monotonic()
            with Session(1) as session:
                seconds.append(time.monotonic() - begin)
            release(session)
    finally:
        guest("redis-1").check_output(f"kill -CONT {pid}")
    assert seconds[0] < 8
    assert seconds[1] < 2


def test_the_password_of_redis_is_in_no_process_list_and_no_open_file(host: Host) -> None:
    # No command may have it as an argument: sudo logs those.
    find = f"sed 's/[^=]*=//' {SECRETS} | grep --fixed-strings --file=- --recursive --files-with-matches"
    assert host.file(SECRETS).content_string.strip().endswith(f"={secret('redis_password_rtpengine')}")
    assert (host.file(SECRETS).mode, host.file(SECRETS).user) == (0o600, "root")
    host.check_output("ps -ww -e -o args > /run/said; journalctl --no-pager -b >> /run/said")
    found = host.run(f"{find} /etc /run/said").stdout.split()
    host.check_output("rm /run/said")
    assert found == [SECRETS]


def test_control_listens_inside_only(host: Host) -> None:
    found = set(host.check_output("ss -Hlntu 'sport = :2223 or sport = :2224 or sport = :2225'").split())
    found = {word for word in found if re.search(r":222[345]$", word)}
    assert found == {f"{INTERNAL}:2223", f"{INTERNAL}:2225", "127.0.0.1:2224"}


def test_whoever_logs_in_sees_sessions_and_module(host: Host) -> None:
    def user(command: str) -> str:
        path = "PATH=/usr/local/bin:/usr/bin:/bin"  # as sshd gives it
        return host.check_output(f"runuser -u {inventory.load().user} -- env {path} sh -c %s", command)

    assert "sessions on this media relay" in user("rtpengine-ctl list sessions")
    assert "Uptime of rtpengine" in user("rtpengine-ctl list totals")
    assert user("lsmod | grep xt_RTPENGINE")


def test_an_option_that_it_does_not_know_never_reaches_it(host: Host) -> None:
    host.check_output("{ cat /etc/rtpengine/rtpengine.conf; echo no-such-option = 1; } >/tmp/bad.conf")
    done = host.run("rtpengine-try-config /tmp/bad.conf")
    assert done.rc != 0
    assert "no-such-option" in done.stderr


def test_the_options_of_the_variables_are_in_force() -> None:
    """50 sessions at most: the fifty-first is refused (one that is answered counts)."""
    ids = [uuid.uuid4().hex for _ in range(51)]
    results = [
        ng("offer", sdp=sdp(PHONE, 6000), direction=["external", "internal"], **{"call-id": i, "from-tag": "a"})
        for i in ids
    ]
    for i in ids:
        ng("delete", **{"call-id": i, "from-tag": "a"})
    assert [r["result"] for r in results[:50]] == ["ok"] * 50
    assert results[50]["result"] != "ok"
