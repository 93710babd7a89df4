"""The command by which a server is started."""

from __future__ import annotations

import argparse

from sglang.srt.server_args import ServerArgs

from vattn_sgl.server import Server


def test_a_key_that_begins_with_a_dash_is_still_a_key(tmp_path):
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    program, verb, *arguments = Server(tmp_path, "torch_native", admin_key="-k3y").command
    assert (program.rpartition("/")[2], verb) == ("sglang", "serve")
    assert parser.parse_args(arguments).admin_api_key == "-k3y"
