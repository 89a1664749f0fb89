"""The Alpaca prompt, and a chat template of the same form for tokenizers without one."""

from __future__ import annotations

PREAMBLE = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."

# For base models: turns in Alpaca's headings. The generation markers tell TRL which tokens are the assistant's.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] in ['system', 'developer'] %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% else %}{{ raise_exception('Alpaca\\'s headings have no place for the role ' + message['role']) }}{% endif %}"
    "{% endfor %}"
)


def alpaca_prompt(instruction: str, input: str | None = "") -> str:
    """Return the prompt of Stanford Alpaca, up to where the response begins."""
    if input:
        return (
            f"{PREAMBLE}, paired with an input that provides further context. {REQUEST}\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    return f"{PREAMBLE}. {REQUEST}\n\n### Instruction:\n{instruction}\n\n### Response:\n"
