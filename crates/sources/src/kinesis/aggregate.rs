//! Records that the Kinesis Producer Library has packed into one: magic bytes, a protobuf message, its MD5.
//!
//! The format is in the library's `aggregation-format.md`; the decoder is by hand, because it needs three kinds of fields of
//! two messages. What does not carry the magic, or whose checksum does not fit, is an ordinary record.

use std::ops::RangeInclusive;

use md5::{Digest, Md5};

const MAGIC: [u8; 4] = [0xF3, 0x89, 0x9A, 0xC2];
const MD5_BYTES: usize = 16;

/// What a record of a stream holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Held<'a> {
    /// Itself.
    One,
    /// User records, in their order.
    Many(Vec<&'a [u8]>),
    /// An aggregate that is not of this shard: the producer has sent its records anew after the shards were split or merged.
    Elsewhere,
}

/// Unpacks a record. `hashes` is the range of hash keys of its shard.
///
/// As in Amazon's own library an aggregate with any record outside of the shard's range is left out whole: its producer sees
/// where it came to lie, and repeats it.
pub(crate) fn unpack<'a>(data: &'a [u8], hashes: &RangeInclusive<u128>) -> Held<'a> {
    let Some(rest) = data.strip_prefix(&MAGIC) else {
        return Held::One;
    };
    let Some((message, checksum)) = rest.split_last_chunk::<MD5_BYTES>() else {
        return Held::One;
    };
    if Md5::digest(message)[..] != checksum[..] {
        return Held::One;
    }
    let Some(aggregate) = aggregate(message) else {
        return Held::One;
    };
    let mut records = Vec::with_capacity(aggregate.records.len());
    for record in &aggregate.records {
        let Some(hash) = aggregate.hash(record) else {
            return Held::One;
        };
        if !hashes.contains(&hash) {
            return Held::Elsewhere;
        }
        records.push(record.data);
    }
    Held::Many(records)
}

/// The hash key of a partition key.
fn hash_of(partition_key: &[u8]) -> u128 {
    u128::from_be_bytes(Md5::digest(partition_key).into())
}

#[derive(Default)]
struct Aggregate<'a> {
    partition_keys: Vec<&'a [u8]>,
    explicit_hashes: Vec<&'a [u8]>,
    records: Vec<UserRecord<'a>>,
}

#[derive(Default)]
struct UserRecord<'a> {
    partition_key: usize,
    explicit_hash: Option<usize>,
    data: &'a [u8],
}

impl Aggregate<'_> {
    fn hash(&self, record: &UserRecord<'_>) -> Option<u128> {
        let key = self.partition_keys.get(record.partition_key)?;
        match record.explicit_hash {
            Some(index) => std::str::from_utf8(self.explicit_hashes.get(index)?)
                .ok()?
                .parse()
                .ok(),
            None => Some(hash_of(key)),
        }
    }
}

/// `AggregatedRecord`: partition keys are its field 1, explicit hash keys 2, records 3.
fn aggregate(message: &[u8]) -> Option<Aggregate<'_>> {
    let mut aggregate = Aggregate::default();
    fields(message, |number, value| {
        match (number, value) {
            (1, Value::Bytes(key)) => aggregate.partition_keys.push(key),
            (2, Value::Bytes(hash)) => aggregate.explicit_hashes.push(hash),
            (3, Value::Bytes(record)) => aggregate.records.push(user_record(record)?),
            _ => {}
        }
        Some(())
    })?;
    Some(aggregate)
}

/// `Record`: the index of its partition key is its field 1, of its explicit hash key 2, its data 3.
fn user_record(message: &[u8]) -> Option<UserRecord<'_>> {
    let mut record = UserRecord::default();
    fields(message, |number, value| {
        match (number, value) {
            (1, Value::Number(index)) => record.partition_key = usize::try_from(index).ok()?,
            (2, Value::Number(index)) => record.explicit_hash = Some(usize::try_from(index).ok()?),
            (3, Value::Bytes(data)) => record.data = data,
            _ => {}
        }
        Some(())
    })?;
    Some(record)
}

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    /// Of a fixed size, which no field that we know has.
    Fixed,
}

/// Calls `f` with the fields of a protobuf message; None if it is none.
fn fields<'a>(
    mut message: &'a [u8],
    mut f: impl FnMut(u64, Value<'a>) -> Option<()>,
) -> Option<()> {
    while !message.is_empty() {
        let tag = varint(&mut message)?;
        let value = match tag & 7 {
            0 => Value::Number(varint(&mut message)?),
            1 => take(&mut message, 8).map(|_| Value::Fixed)?,
            2 => {
                let length = usize::try_from(varint(&mut message)?).ok()?;
                Value::Bytes(take(&mut message, length)?)
            }
            5 => take(&mut message, 4).map(|_| Value::Fixed)?,
            _ => return None,
        };
        f(tag >> 3, value)?;
    }
    Some(())
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(bytes, 1)?[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(n)?;
    *bytes = rest;
    Some(taken)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2];
        let mut length = bytes.len();
        while length >= 0x80 {
            out.push(length as u8 | 0x80);
            length >>= 7;
        }
        out.push(length as u8);
        out.extend(bytes);
        out
    }

    /// An aggregate of records: partition key, explicit hash key, data.
    pub(crate) fn pack(records: &[(&str, Option<u128>, &[u8])]) -> Vec<u8> {
        let mut message = Vec::new();
        let mut explicit = 0;
        for (key, hash, _) in records {
            message.extend(field(1, key.as_bytes()));
            if let Some(hash) = hash {
                message.extend(field(2, hash.to_string().as_bytes()));
            }
        }
        for (index, (_, hash, data)) in records.iter().enumerate() {
            let mut record = vec![1 << 3, index as u8];
            if hash.is_some() {
                record.extend([2 << 3, explicit]);
                explicit += 1;
            }
            record.extend(field(3, data));
            // Tags, which nobody reads.
            record.extend(field(4, &field(1, b"tag")));
            message.extend(field(3, &record));
        }
        let checksum = Md5::digest(&message);
        [&MAGIC[..], &message, &checksum].concat()
    }

    const ALL: RangeInclusive<u128> = 0..=u128::MAX;

    #[test]
    fn aggregates_are_unpacked() {
        let long = vec![b'x'; 300];
        let packed = pack(&[("k", None, b"one"), ("l", Some(7), &long), ("k", None, b"")]);
        assert_eq!(unpack(&packed, &ALL), Held::Many(vec![b"one", &long, b""]));
        assert_eq!(unpack(&pack(&[]), &ALL), Held::Many(Vec::new()));
    }

    #[test]
    fn what_is_no_aggregate_is_itself() {
        let packed = pack(&[("k", None, b"one")]);
        let mut changed = packed.clone();
        changed[6] ^= 1;
        let mut no_message = MAGIC.to_vec();
        no_message.push(0xff);
        no_message.extend(Md5::digest([0xff]));
        for data in [
            &b""[..],
            b"{}",
            &MAGIC,
            &packed[1..],
            &packed[..packed.len() - 1],
            &changed,
            &no_message,
        ] {
            assert_eq!(unpack(data, &ALL), Held::One);
        }
    }

    #[test]
    fn an_aggregate_of_another_shard_is_left_out() {
        // The MD5 of "k" as a number.
        let hash = hash_of(b"k");
        assert_eq!(hash >> 120, 0x8c);
        let packed = pack(&[("k", None, b"1"), ("k", Some(5), b"2")]);
        assert_eq!(unpack(&packed, &(5..=hash)), Held::Many(vec![b"1", b"2"]));
        assert_eq!(unpack(&packed, &(6..=hash)), Held::Elsewhere);
        assert_eq!(unpack(&packed, &(0..=hash - 1)), Held::Elsewhere);
    }
}
