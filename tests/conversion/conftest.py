import sys
from pathlib import Path

from nemo_ext import platform

platform.activate()  # before transformers: it also makes torchvision importable beside a CPU torch
sys.path.insert(0, str(Path(__file__).parent))
