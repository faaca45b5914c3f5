"""Numbers as protobuf writes them, for messages that are put together without it."""

_SMALL = [bytes([number]) for number in range(128)]


def varint(number: int) -> bytes:
    """`number`, not negative: seven bits a byte, the lowest first, each but the last with its highest bit set."""
    if number < 128:
        return _SMALL[number]
    coded = bytearray()
    while number > 127:
        coded.append(number & 127 | 128)
        number >>= 7
    coded.append(number)
    return bytes(coded)
