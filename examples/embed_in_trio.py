# The server as one task of a trio nursery: it ends with the nursery, and in good order.
#
#   Run:   python examples/embed_in_trio.py
#   Open:  http://127.0.0.1:8000
#   See:   a clock, told by a task that lives next to the server.
#   Next:  press Ctrl+C: the nursery is cancelled, and the page shows that it was closed with 1001,
#          "going away". Then start `clock` twice.

import signal
import time
from functools import partial

import trio

import roomsock

app = roomsock.App()

PAGE = """<!doctype html><meta charset="utf-8"><title>roomsock in trio</title>
<body style="font: 2rem system-ui; color-scheme: light dark"><pre id="log">...</pre><script>
const log = document.getElementById("log");
const scheme = location.protocol === "https:" ? "wss" : "ws";
const socket = new WebSocket(`${scheme}://${location.host}/clock`);
socket.onmessage = (event) => { log.textContent = event.data; };
socket.onclose = (event) => { log.textContent += `\\nclosed with ${event.code}`; };
</script>"""


@app.get("/")
def page(request):
    return PAGE


@app.on_message("/clock")
def hush(ws, text):
    """Everybody at /clock is in its room; what they say is nobody's business."""


async def clock():
    room = app.room("/clock")
    while True:
        room.send_text(f"{time.strftime('%H:%M:%S')}, {len(room)} watching")
        await trio.sleep(1)


async def main(port: int = 8000):
    async with trio.open_nursery() as nursery:
        # start() comes back when the server listens, with the server; not a moment before.
        server = await nursery.start(partial(roomsock.serve, app, port=port))
        print("listening at", *server.addresses)
        nursery.start_soon(clock)
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            await anext(signals)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
