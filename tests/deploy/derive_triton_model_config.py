"""Writes triton_model_config.json: the messages of Triton's config.pbtxt, for google.protobuf.

    pip install --no-deps --target DIR tritonclient
    python tests/deploy/derive_triton_model_config.py DIR

Read from tritonclient's generated module (BSD-3-Clause), which holds the messages' descriptor and no comments.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from importlib import metadata
from pathlib import Path

from google.protobuf import descriptor_pb2, json_format


def main(folder: Path) -> None:
    """Read the package below `folder` and write the file beside this one."""
    text = (folder / "tritonclient/grpc/model_config_pb2.py").read_text()
    literal = re.search(r"AddSerializedFile\((b(['\"]).*?\2)\)\n", text, re.S)[1]
    descriptor = descriptor_pb2.FileDescriptorProto.FromString(ast.literal_eval(literal))
    (version,) = {each.version for each in metadata.distributions(path=[str(folder)]) if each.metadata["Name"] == "tritonclient"}
    content = {"from": {"tritonclient": version}, "file": json_format.MessageToDict(descriptor)}
    Path(__file__).with_name("triton_model_config.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
