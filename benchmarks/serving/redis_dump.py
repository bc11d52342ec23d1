"""Write the keys of a small Redis as JSON that people can read, and put them back."""

import json
from collections.abc import Mapping
from typing import Any

from redis import Redis

LEFT_OUT = ("wan:tokenizer:",)
"""Long texts, which come again with each worker."""


def dump(redis: Redis) -> dict[str, Any]:
    """Return every key with its type and value; bytes that are no text as hexadecimal digits."""
    client: Any = redis
    found = {}
    for key in sorted(client.keys("*")):
        name = key.decode()
        if name.startswith(LEFT_OUT):
            continue
        kind = client.type(key).decode()
        read = {
            "string": client.get,
            "hash": client.hgetall,
            "list": lambda k: client.lrange(k, 0, -1),
            "set": client.smembers,
            "zset": lambda k: client.zrange(k, 0, -1, withscores=True),
            "stream": client.xrange,
        }[kind]
        found[name] = {"type": kind, "value": _to_text(read(key))}
    return found


def as_text(commit: str, keys: Mapping[str, Any]) -> str:
    """Return a dump and the commit that wrote it as JSON, with a line for each key."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(keys[name])}" for name in sorted(keys))
    return f'{{"commit": {json.dumps(commit)}, "keys": {{\n{lines}\n}}}}\n'


def restore(redis: Redis, keys: Mapping[str, Any]) -> None:
    """Write the keys of a `dump`; those that expired by then do not expire."""
    client: Any = redis
    for name, found in keys.items():
        value = _to_bytes(found["value"])
        match found["type"]:
            case "string":
                client.set(name, value)
            case "hash":
                client.hset(name, mapping=dict(value))
            case "list":
                client.rpush(name, *value)
            case "set":
                client.sadd(name, *value)
            case "zset":
                client.zadd(name, dict(value))
            case "stream":
                for entry, fields in value:
                    client.xadd(name, dict(fields), id=entry)


def _to_text(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"hex": value.hex()}
    if isinstance(value, dict):
        return [[_to_text(name), _to_text(each)] for name, each in value.items()]
    if isinstance(value, set):
        return sorted((_to_text(each) for each in value), key=json.dumps)
    if isinstance(value, (list, tuple)):
        return [_to_text(each) for each in value]
    return value


def _to_bytes(value: Any) -> Any:
    if isinstance(value, dict):
        return bytes.fromhex(value["hex"])
    if isinstance(value, list):
        return [_to_bytes(each) for each in value]
    return value
