"""SIP over TLS for SIPp, which does TCP only: run as a program on the phone's side, with this module's arguments.

It accepts connections at the first address and port and forwards them to the second over TLS. The far end must have a
certificate for the domain, from the CA in the file (RFC 5922, section 7); else the tunnel closes the connection and
prints the reason.
"""

import asyncio
import contextlib
import ssl
import sys

LISTENS = "listens"


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _main(here: str, port: str, proxy: str, proxy_port: str, domain: str, ca: str) -> None:
    trust = ssl.create_default_context(cafile=ca)

    async def lead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far = await asyncio.open_connection(
                proxy, int(proxy_port), ssl=trust, server_hostname=domain, local_addr=(here, 0)
            )
        except OSError as error:
            print(f"{proxy}:{proxy_port}: {error}", flush=True)  # noqa: T201  # for the parent process
            writer.close()
            return
        await asyncio.gather(_pump(reader, far[1]), _pump(far[0], writer))

    server = await asyncio.start_server(lead, here, int(port))
    print(LISTENS, flush=True)  # noqa: T201
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
