"""Greedy text from an artifact through Hugging Face optimum, which generates as transformers does.

python examples/optimum_generate.py ARTIFACT "What is the capital of France?" --max-new-tokens 64
"""

import argparse

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

parser = argparse.ArgumentParser(description="Greedy text from an artifact through optimum.")
parser.add_argument("artifact")
parser.add_argument("prompt")
parser.add_argument("--max-new-tokens", type=int, default=128)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.artifact)
model = ORTModelForCausalLM.from_pretrained(options.artifact)
# optimum-onnx 0.1.0 takes hidden_size / heads for the size of a head, which is wrong for Qwen3, among others, and as
# many key/value heads as heads in some families, which is wrong for Phi-3.
model.embed_size_per_head = getattr(model.config, "head_dim", None) or model.embed_size_per_head
model.num_key_value_heads = getattr(model.config, "num_key_value_heads", None) or model.num_key_value_heads
text = options.prompt
if tokenizer.chat_template:
    turns = [{"role": "user", "content": text}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
ids, mask = inputs["input_ids"], inputs["attention_mask"]
room = model.config.max_position_embeddings - ids.shape[1]
count = min(options.max_new_tokens, room)
output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
