"""Where a run's metrics go besides its own folder."""

from dataclasses import dataclass

KINDS = ("none", "wandb")
MODES = ("online", "offline", "disabled")


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """The `logger` group. `mode` null: online with an API key, else offline."""

    kind: str
    project: str | None
    entity: str | None
    group: str | None
    tags: str | None  # comma separated
    mode: str | None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"logger.kind is {self.kind!r}; choose one of {', '.join(KINDS)}"
            )
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(
                f"logger.mode is {self.mode!r}; choose one of {', '.join(MODES)}, null"
            )
        if self.kind == "wandb" and not self.project:
            raise ValueError(
                f"logger.project is {self.project!r} with logger.kind='wandb'; "
                "name a wandb project, for example logger.project=relax"
            )
        if self.tags is not None and not all(self.tag_list):
            raise ValueError(
                f"logger.tags is {self.tags!r}, which holds an empty tag; "
                "write tags as 'first,second', or null for none"
            )

    @property
    def tag_list(self) -> list[str]:
        """The tags without surrounding spaces, in the order given."""
        return [tag.strip() for tag in self.tags.split(",")] if self.tags else []
