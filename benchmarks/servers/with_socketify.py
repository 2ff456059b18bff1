"""The benchmarks' server, made with socketify (C++ uWebSockets): ``with_socketify.py libuv``."""

from common import decode, encode
from socketify import App, OpCode

# The default of 16 KiB is less than the largest echo, and members who are behind by more than
# 64 KiB silently miss messages: others would not.
LIMITS = {"max_payload_length": 2 * 1024 * 1024, "max_backpressure": 16 * 1024 * 1024}


def upgrade(res, req, context):
    key = req.get_header("sec-websocket-key")
    protocol = req.get_header("sec-websocket-protocol")
    extensions = req.get_header("sec-websocket-extensions")
    res.upgrade(key, protocol, extensions, context, req.get_parameter(0))


def echo(ws, message, opcode):
    ws.send(message, opcode)


def say(ws, message, opcode):
    ws.send(encode(decode(message)), OpCode.TEXT)


def enter(ws):
    ws.subscribe(ws.get_user_data())


def talk(ws, message, opcode):
    ws.publish(ws.get_user_data(), message, opcode)


app = App()
app.ws("/echo", {**LIMITS, "message": echo})
app.ws("/binary", {**LIMITS, "message": echo})
app.ws("/json", {**LIMITS, "message": say})
app.ws("/room/:name", {**LIMITS, "upgrade": upgrade, "open": enter, "message": talk})
app.listen({"port": 0, "host": "127.0.0.1"}, lambda config: print(config.port, flush=True))
app.run()
