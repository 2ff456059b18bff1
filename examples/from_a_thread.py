# Publishing from a plain thread: what you type in the terminal appears in every browser.
#
#   Run:   python examples/from_a_thread.py
#   Open:  http://127.0.0.1:8000, then type lines into the terminal
#   See:   each line in every open tab, in order.
#   Next:  feed it by a pipe: (while date; do sleep 1; done) | python examples/from_a_thread.py

import contextlib
import sys
import threading

import roomsock

app = roomsock.App()

PAGE = """<!doctype html><meta charset="utf-8"><title>roomsock from a thread</title>
<body style="font: 1.2rem system-ui; color-scheme: light dark">
<p>Type into the terminal of the server.<pre id="log"></pre><script>
const log = document.getElementById("log");
const scheme = location.protocol === "https:" ? "wss" : "ws";
const socket = new WebSocket(`${scheme}://${location.host}/lines`);
socket.onmessage = (event) => { log.textContent += event.data; };
socket.onclose = (event) => { log.textContent += `(closed with ${event.code})`; };
</script>"""


@app.get("/")
def page(request):
    return PAGE


@app.on_message("/lines")
def hush(ws, text):
    """Everybody at /lines is in its room; they only listen."""


def publish(lines):
    """Hand each line to the event loop; blocking here blocks nobody but this thread.

    Everything of roomsock belongs to the loop's thread. call_soon_threadsafe is the one door from
    outside: it returns at once, and the calls are made in order.
    """
    room = app.room("/lines")
    for line in lines:
        with contextlib.suppress(RuntimeError):  # not served yet: nobody is there to read it
            app.call_soon_threadsafe(room.send_text, line)


if __name__ == "__main__":
    # A daemon, because a thread that waits for the keyboard cannot be told to stop.
    threading.Thread(target=publish, args=(sys.stdin,), daemon=True).start()
    roomsock.run(app, host="127.0.0.1", port=8000)
