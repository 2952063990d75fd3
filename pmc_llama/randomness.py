"""Random numbers and permutations as pure functions of a seed and counters: nothing drawn, nothing stored."""

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BitArray = NDArray[np.uint64]

# What a random number is for; distinct purposes have independent numbers.
ORDER, PLACE, OFFSET, REST, DROPOUT = 0, 1, 2, 3, 4

_FEISTEL_ROUNDS = 10


def _mix(bits: BitArray) -> BitArray:
    """Mix 64 bits so that each input bit reaches every output bit: the output function of SplitMix64.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with the
    constants (variant 13 of David Stafford) of Sebastiano Vigna's splitmix64.c.
    """
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _draw(state: BitArray, counter: BitArray) -> BitArray:
    """Draw number `counter` of the SplitMix64 generator whose state is `state`: uint64, broadcast."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        return _mix(state + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def random_bits(seed: int, *counters: IntArray | int) -> BitArray:
    """Random uint64 numbers as a pure function of the seed and the counters.

    Counters are integers or int64 arrays that broadcast. Each one picks a number of the SplitMix64 stream
    that the number before it seeds, so numbers of different counters are independent for any purpose but
    cryptography.
    """
    state = np.asarray(seed % 2**64, dtype=np.uint64)
    for counter in counters:
        state = _draw(state, np.asarray(counter).astype(np.uint64))
    return state


def permute(index: IntArray, size: int, seed: int, epoch: IntArray) -> IntArray:
    """Each index, int64 [n] in 0 .. size - 1, under the permutation that (seed, its epoch) picks.

    A bijection of 0 .. size - 1 for every size of 1 or more, computed without a table. A Feistel network
    permutes the next power of two; an image outside the range is permuted again until it falls inside
    ("cycle walking", Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002), fewer than
    two rounds of the network an index on average.

    Four rounds would do for large domains (Luby and Rackoff, 1988), small ones need more: this takes the 10
    of NIST's format-preserving FF1 (SP 800-38G). Over 20,000 epochs of 13 or more items, neither the place
    of an item nor its neighbour then departs from chance; of 5 to 8 items some orders remain more frequent
    than others (`benchmarks/sample_order.py`).
    """
    return _walk(index, size, seed, epoch, range(_FEISTEL_ROUNDS))


def inverse(image: IntArray, size: int, seed: int, epoch: IntArray) -> IntArray:
    """The index, int64 [n], that `permute` takes to each image, int64 [n] in 0 .. size - 1."""
    return _walk(image, size, seed, epoch, range(_FEISTEL_ROUNDS)[::-1])


def _walk(index: IntArray, size: int, seed: int, epoch: IntArray, rounds: range) -> IntArray:
    """Each index through the rounds of the network, in this order, until it is below `size`.

    A round changes one half by the other, and done twice changes nothing: backwards, the rounds undo each
    other, and the walk along a cycle goes back by the way that it came.
    """
    bits = (size - 1).bit_length()
    right_bits = np.uint64((bits + 1) // 2)
    left_mask, right_mask = np.uint64(2 ** (bits // 2) - 1), np.uint64(2 ** ((bits + 1) // 2) - 1)
    epochs, of_epoch = np.unique(epoch, return_inverse=True)
    keys = random_bits(seed, epochs[None, :], ORDER, np.arange(_FEISTEL_ROUNDS)[:, None])

    image = index.astype(np.uint64)
    walking = np.arange(len(index))
    while len(walking):
        left, right = image[walking] >> right_bits, image[walking] & right_mask
        key_of = keys[:, of_epoch[walking]]
        for number in rounds:
            if number % 2:
                right ^= _draw(key_of[number], left) & right_mask
            else:
                left ^= _draw(key_of[number], right) & left_mask
        image[walking] = (left << right_bits) | right
        walking = walking[image[walking] >= np.uint64(size)]
    return image.astype(np.int64)
