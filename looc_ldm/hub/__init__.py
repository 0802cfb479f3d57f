"""Push to the hub, with a model card of measured figures."""

from looc_ldm.hub.upload import HubMixin, push

__all__ = ["HubMixin", "push"]
