"""A bank: one basis and any number of named tasks on one base model."""

from .bank import CoreBank
from .task import Task

__all__ = ["CoreBank", "Task"]
