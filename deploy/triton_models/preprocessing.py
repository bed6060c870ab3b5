"""Triton model: text to what the tensorrt_llm model reads. deploy/triton.py copies this file; it runs in Triton's container."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Tokenises prompts and stop words."""

    def initialize(self, args):
        """Load the tokenizer, and the tokens that end an answer. Raises ValueError if it has none."""
        from transformers import AutoTokenizer

        parameters = {name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()}
        folder = parameters["tokenizer_dir"]
        self.special_tokens = parameters["special_tokens"] == "true"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.end = self.tokenizer.eos_token_id
        if self.end is None:
            raise ValueError(f"{folder}: the tokenizer has no eos_token")
        self.pad = self.end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self.further_ends = [token for token in end_tokens(Path(folder)) if token != self.end]

    def execute(self, requests):
        """A response a request; what is wrong with one is its own error."""
        responses = []
        for request in requests:
            try:
                responses.append(pb_utils.InferenceResponse(output_tensors=self.answer(request)))
            except ValueError as problem:
                responses.append(pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(problem))))
        return responses

    def answer(self, request):
        """The tensors of one request, all with a batch dimension of 1. Raises ValueError."""
        text = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()
        if text.shape != (1, 1):
            raise ValueError(f"text has shape {list(text.shape)}: a request holds one prompt, [1, 1]")
        prompt = self.tokenizer.encode(text[0, 0].decode("utf-8"), add_special_tokens=self.special_tokens)
        if not prompt:
            raise ValueError("the prompt has no tokens")
        given = pb_utils.get_input_tensor_by_name(request, "stop")
        words = [] if given is None else [each.decode("utf-8") for each in given.as_numpy().reshape(-1)]
        stop = [self.tokenizer.encode(word, add_special_tokens=False) for word in words]
        stop = [tokens for tokens in stop if tokens] + [[token] for token in self.further_ends]
        return [
            pb_utils.Tensor("input_ids", np.array([prompt], np.int32)),
            pb_utils.Tensor("input_lengths", np.array([[len(prompt)]], np.int32)),
            pb_utils.Tensor("stop_words_list", word_list(stop)[None]),
            pb_utils.Tensor("end_id", np.array([[self.end]], np.int32)),
            pb_utils.Tensor("pad_id", np.array([[self.pad]], np.int32)),
        ]


def end_tokens(folder):
    """The tokens that generation_config.json says end an answer: chat models have several."""
    file = folder / "generation_config.json"
    found = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    return found if isinstance(found, list) else [] if found is None else [found]


def word_list(words):
    """TensorRT-LLM's form of a list of words, [2, n]: their tokens one after the other, and where each word ends, then -1.

    A list without words is a token that no word has.
    """
    tokens = [token for word in words for token in word] or [0]
    ends = np.cumsum([len(word) for word in words], dtype=np.int32)
    return np.array([tokens, [*ends, *[-1] * (len(tokens) - len(ends))]], np.int32)
