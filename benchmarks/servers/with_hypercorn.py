"""The benchmarks' server, Starlette on Hypercorn: ``with_hypercorn.py asyncio|trio``."""

import asyncio
import sys

import trio
from common import free_socket
from hypercorn.asyncio import serve as serve_asyncio
from hypercorn.config import Config
from hypercorn.trio import serve as serve_trio
from starlette_app import app

config = Config()
config.loglevel = "WARNING"
sock = free_socket()
config.bind = [f"fd://{sock.fileno()}"]

if sys.argv[1] == "trio":
    trio.run(serve_trio, app, config)
else:
    asyncio.run(serve_asyncio(app, config))
