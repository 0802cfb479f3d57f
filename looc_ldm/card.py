"""The documented path of `looc_ldm.hub.card`."""

from looc_ldm.hub.card import is_ours as is_ours
from looc_ldm.hub.card import model_card as model_card
from looc_ldm.hub.card import picture_name as picture_name
from looc_ldm.hub.card import title as title
from looc_ldm.hub.card import write_card as write_card
