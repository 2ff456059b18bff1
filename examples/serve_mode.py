# A guessing game: here the handler owns the loop, so the state of a game is a local variable.
#
#   Run:   python examples/serve_mode.py
#   Open:  http://127.0.0.1:8000
#   See:   "higher" and "lower" until you have it, then a new game. Each tab plays its own.
#   Next:  put `with anyio.fail_after(60):` around a round and answer TimeoutError with a taunt.

import random
from pathlib import Path
from typing import Annotated

import msgspec

import roomsock

app = roomsock.App()


class Guess(msgspec.Struct):
    number: Annotated[int, msgspec.Meta(ge=1, le=100)]


@app.get("/")
def page(request):
    return Path(__file__).with_name("serve_mode.html")


@app.serve("/guess")
async def game(ws):
    # No test for "still connected": when the player leaves, receive_json raises
    # ConnectionClosed, and a handler that ends with it has ended well.
    while True:
        tries = await one_round(ws, secret=random.randint(1, 100))
        await ws.send_json({"say": f"Yes! You needed {tries}.", "won": tries})


async def one_round(ws, secret: int) -> int:
    await ws.send_json({"say": "I am thinking of a number from 1 to 100.", "new": True})
    tries = 0
    while True:
        try:
            guess = await ws.receive_json(Guess)
        except roomsock.InvalidMessage as error:  # in serve mode it is ours to decide
            await ws.send_json({"say": f"That does not count: {error}"})
            continue
        tries += 1
        if guess.number == secret:
            return tries
        await ws.send_json({"say": "Higher." if guess.number < secret else "Lower."})


if __name__ == "__main__":
    roomsock.run(app, host="127.0.0.1", port=8000)
