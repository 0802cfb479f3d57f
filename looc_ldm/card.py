"""The documented path of `looc_ldm.hub.card`."""

from looc_ldm.hub.card import write_card as write_card
