"""The authors' model beside ours, from a clone of bytedance/1d-tokenizer at 942a96f.

Beyond torch, their file needs an MLP and a base class only, so their other requirements need not
be installed.
"""

import sys
from types import SimpleNamespace

from torch import nn


class Settings(dict):
    __getattr__ = dict.__getitem__


def mlp(in_features, hidden_features, drop=0.0, **_):
    return nn.Sequential(nn.Linear(in_features, hidden_features), nn.GELU(), nn.Dropout(drop),
                         nn.Linear(hidden_features, in_features), nn.Dropout(drop))


def authors_model(clone, config):
    """Their model with the sizes of a Config. It is called as ours is."""
    sys.modules["timm.layers"] = SimpleNamespace(Mlp=mlp)
    sys.modules["modeling.modules"] = SimpleNamespace(BaseModel=nn.Module)
    sys.path.insert(0, str(clone))
    from modeling.rar import RAR
    sizes = Settings(
        hidden_size=config.width, num_hidden_layers=config.depth, dropout=config.dropout,
        num_attention_heads=config.heads, intermediate_size=config.mlp_width,
        image_seq_len=config.grid_size**2, condition_num_classes=config.num_classes,
        attn_drop=config.dropout, codebook_size=config.codebook_size)
    model = RAR(Settings(model=Settings(generator=sizes, vq_model=sizes)))
    model.forward = lambda tokens, labels, orders: model.forward_fn(
        tokens, model.preprocess_condition(labels), orders=orders)[:, :-1]
    return model
