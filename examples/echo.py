# The smallest one: whatever text comes in goes back out.
#
#   Run:   python examples/echo.py
#   Open:  http://127.0.0.1:8000
#   See:   each line you send comes back, with the time it took.
#   Next:  annotate `text: str | bytes` to take binary frames too; now one closes with 1003.

from pathlib import Path

import roomsock

app = roomsock.App()


@app.get("/")
def page(request):
    return Path(__file__).with_name("echo.html")


@app.on_message("/echo")
async def echo(ws, text: str):
    # A send is queued when it is called. Awaiting it as well holds this client back when it
    # sends faster than it reads; messages of one client are handled one at a time, in order.
    await ws.send_text(text)


if __name__ == "__main__":
    roomsock.run(app, host="127.0.0.1", port=8000)
