"""The former name of this room's door: what other rooms still import from here."""

from raymill.tokenizer.tokenizer import StreamDecoder as StreamDecoder
from raymill.tokenizer.tokenizer import Tokenizer as Tokenizer
from raymill.tokenizer.training import END_OF_TEXT as END_OF_TEXT
from raymill.tokenizer.training import IM_END as IM_END
from raymill.tokenizer.training import IM_START as IM_START
from raymill.tokenizer.training import SMALLEST_VOCAB as SMALLEST_VOCAB
from raymill.tokenizer.training import SPECIAL_TOKENS as SPECIAL_TOKENS
