"""Chat templates in the style of real models, each with a feature that makes it hard to invert."""

from __future__ import annotations

# a date before the first turn, trimmed contents
LLAMA = (
    "{{ '<s>' }}{% if messages[0].role != 'system' %}{{ '[sys]Today is ' ~ today ~ '[end]' }}{% endif %}"
    "{% for m in messages %}{{ '[' ~ m.role ~ ']' ~ (m.content | trim) ~ '[end]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% if quiet %}{{ '<think></think>' }}{% endif %}{% endif %}"
)
# an answer of a conversation names its channel, the generation prompt leaves it to the model
GPT_OSS = (
    "{{ '<|start|>system<|message|>Today is ' ~ today ~ '<|end|>' }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ '<|start|>developer<|message|># Instructions\n\n' ~ m.content ~ '<|end|>' }}"
    "{% elif m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' ~ m.content ~ '<|end|>' }}"
    "{% else %}{{ '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# bare system prompt, nothing after a user's turn, and a generation prompt that opens or closes the thoughts
DEEPSEEK = (
    "{{ '<bos>' }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<A></think>' ~ m.content ~ '<eos>' }}{% else %}{{ '<U>' ~ m.content }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<A>' ~ ('<think>' if thinking else '</think>') }}{% endif %}"
)
# the system prompt is part of the user's turn: ids with one cannot be inverted
GEMMA = (
    "{{ '<bos>' }}{% for m in messages if m.role != 'system' %}"
    "{{ '<turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' }}"
    "{% if loop.first and messages[0].role == 'system' %}{{ messages[0].content ~ '\n\n' }}{% endif %}"
    "{{ (m.content | trim) ~ '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
# Qwen's: tools and calls are part of the prompt
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' ~ ('user' if m.role == 'tool' else m.role) ~ '\n' ~ (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' ~ (call | tojson) ~ '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
