"""Byte-level BPE tokenizers small enough to build in a test, with the usual chat templates."""

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|end|>"]
# In real thinking tokenizers these are added tokens, not special ones, and two line ends are one.
THINKING = ["<think>", "</think>", "\n\n"]
CORPUS = ["abcabc abc the answer is four, hello hello hello there user assistant system"] * 20

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_end|>\n\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
ALWAYS_OPEN = CHATML.split("{% if add_generation_prompt")[0] + "{{ '<|im_start|>assistant\\n' }}"
# As gpt-oss: the last answer ends with another token than those before it.
RETURNS = CHATML.replace(
    "<|im_end|>", "{% if loop.last and m.role == 'assistant' %}<|end|>{% else %}<|eot|>{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
DOUBLE_BOS = "{{ bos_token }}" + LLAMA3
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
FORGETS_SYSTEM = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
)
# As Qwen3: an open prompt while thinking is on; a finished last answer always shows the block.
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '<think>' not in m.content %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
# As later ones: the prompt opens the block itself while thinking is on.
OPENS_THINKING = THINKS.replace(
    "<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}",
)


def hf_tokenizer(template=None, *, bos=True, eos="<eos>", pad="<pad>", thinking=False):
    """A byte-level BPE tokenizer; `bos`: whether plain encoding puts <bos> in front."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
        )
    if thinking:
        core.add_tokens(THINKING)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token=eos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_tokenizer(template=None, *, stops=(), **options):
    """The same as mlx-lm wraps it; `stops`: more tokens at which generation stops."""
    tokenizer = hf_tokenizer(template, **options)
    return TokenizerWrapper(
        tokenizer, eos_token_ids=[tokenizer.convert_tokens_to_ids(stop) for stop in stops]
    )
