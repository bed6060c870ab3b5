"""Triton model: tokens to text. deploy/triton.py copies this file; it runs in Triton's container."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Decodes answers, special tokens left out."""

    def initialize(self, args):
        """Load the tokenizer."""
        from transformers import AutoTokenizer

        parameters = json.loads(args["model_config"])["parameters"]
        self.tokenizer = AutoTokenizer.from_pretrained(parameters["tokenizer_dir"]["string_value"])

    def execute(self, requests):
        """A response a request: [1, beams] texts of [1, beams, tokens] and the number of tokens of each."""
        responses = []
        for request in requests:
            tokens = pb_utils.get_input_tensor_by_name(request, "output_ids").as_numpy()[0]
            lengths = pb_utils.get_input_tensor_by_name(request, "sequence_length").as_numpy()[0]
            answers = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
            texts = [text.encode("utf-8") for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]
            responses.append(pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("text", np.array([texts], np.object_))]))
        return responses
