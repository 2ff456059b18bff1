"""The benchmarks' server, Starlette on uvicorn: ``with_uvicorn.py websockets-sansio|wsproto``.

The first is what uvicorn takes by itself when the websockets package is there. uvloop and httptools
are its recommended installation.
"""

import sys

import uvicorn
from common import free_socket
from starlette_app import app

config = uvicorn.Config(
    app,
    loop="uvloop",
    http="httptools",
    ws=sys.argv[1],
    log_level="warning",  # no line for each connection: nobody else writes one either
)
uvicorn.Server(config).run(sockets=[free_socket()])
