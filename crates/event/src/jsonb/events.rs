//! An array of events as jsonb: its text, and where in it each event is, found while the text is written. What is known of a
//! value by its form need not be found out from its text: that the text is JSON, how deep it is, which keys it has.

use std::ops::Range;

use super::{
    CONTAINER, Container, Element, MAX_TEXT_BYTES, OBJECT, STRING, end_of, print, print_scalar,
    room_for,
};
use crate::json::{self, MAX_DEPTH, SHORT_NUMBER};
use crate::names;
use crate::schema;

/// Events come in a few shapes; so many are kept in mind.
const SHAPES: usize = 8;

/// The text of an array, and its items.
#[derive(Debug)]
pub struct Events {
    pub text: String,
    pub items: Vec<Item>,
}

/// An element of the array. Ranges are bytes of the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    pub all: Range<usize>,
    /// None: it is not of the usual form, or there is something about it that has to be looked at.
    pub parts: Option<Parts>,
}

/// `{"collection": string, "properties": object}`, the properties of allowed depth and without the server's own fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts {
    /// With its quotes.
    pub collection: Range<usize>,
    pub properties: Range<usize>,
    /// The value of the `_id`.
    pub id: Option<Range<usize>>,
}

/// The text of a jsonb array and its items; `bytes` as for [`super::to_text`]. None where that answers None, and for what is
/// no array. The text comes to lie in `buffer`, whatever it holds now.
pub fn read(bytes: &[u8], buffer: Vec<u8>) -> Option<Events> {
    let mut array = Container::new(bytes)?;
    if array.opening() != Some(b'[') {
        return None;
    }
    let mut out = buffer;
    out.clear();
    out.reserve(room_for(bytes));
    let mut shapes = Shapes::default();
    let mut items = Vec::with_capacity(array.values.len());
    out.push(b'[');
    while let Some(element) = array.next()? {
        if !items.is_empty() {
            out.extend_from_slice(b", ");
        }
        let start = out.len();
        let parts = print_item(&element, &mut out, &mut shapes)?;
        items.push(Item {
            all: start..out.len(),
            parts,
        });
        if out.len() > MAX_TEXT_BYTES {
            return None;
        }
    }
    out.push(b']');
    let text = String::from_utf8(out).ok()?;
    Some(Events { text, items })
}

/// Writes an item; None inside if it has to be looked at.
fn print_item<'a>(
    item: &Element<'a>,
    out: &mut Vec<u8>,
    shapes: &mut Shapes<'a>,
) -> Option<Option<Parts>> {
    if item.kind != CONTAINER {
        print_scalar(item, out)?;
        return Some(None);
    }
    let mut pairs = Container::new(item.data)?;
    let Some((collection, properties)) = usual(&mut pairs) else {
        print(Container::new(item.data)?, out, MAX_TEXT_BYTES)?;
        return Some(None);
    };
    out.extend_from_slice(b"{\"collection\": ");
    let start = out.len();
    json::write_bytes(collection, out);
    let collection = start..out.len();
    out.extend_from_slice(b", \"properties\": ");
    let start = out.len();
    let found = print_properties(properties, out, shapes)?;
    let parts = found.map(|id| Parts {
        collection,
        properties: start..out.len(),
        id,
    });
    out.push(b'}');
    Some(parts)
}

/// Name and properties, if that is what the item has.
fn usual<'a>(pairs: &mut Container<'a>) -> Option<(&'a [u8], &'a [u8])> {
    if pairs.kind != OBJECT || pairs.values.len() != 2 {
        return None;
    }
    // The order is that of jsonb: by length, then by bytes.
    let collection = pairs.next()??;
    let properties = pairs.next()??;
    let is_usual = collection.key == Some(b"collection")
        && collection.kind == STRING
        && properties.key == Some(b"properties")
        && properties.kind == CONTAINER;
    is_usual.then_some((collection.data, properties.data))
}

/// Writes the properties; where the `_id` is. None inside if they have to be looked at.
fn print_properties<'a>(
    bytes: &'a [u8],
    out: &mut Vec<u8>,
    shapes: &mut Shapes<'a>,
) -> Option<Option<Option<Range<usize>>>> {
    let mut pairs = Container::new(bytes)?;
    if pairs.kind != OBJECT {
        print(pairs, out, MAX_TEXT_BYTES)?;
        return Some(None);
    }
    let shape = shapes.of(&pairs)?;
    let mut is_usual = shape.is_usual;
    let mut id = None;
    out.push(b'{');
    let mut from = 0;
    for (index, to) in shape.ends.iter().enumerate() {
        out.extend_from_slice(shape.keys.get(from..*to)?);
        from = *to;
        let start = out.len();
        let value = pairs.value()?;
        if value.kind == CONTAINER {
            let levels = print(Container::new(value.data)?, out, MAX_TEXT_BYTES)?;
            is_usual &= levels < MAX_DEPTH;
        } else {
            print_scalar(&value, out)?;
        }
        // A long number may be none that a numeric takes.
        is_usual &= value.kind == STRING || out.len() - start <= SHORT_NUMBER;
        if shape.id == Some(index) {
            id = Some(start..out.len());
        }
        if out.len() > MAX_TEXT_BYTES {
            return None;
        }
    }
    out.push(b'}');
    Some(is_usual.then_some(id))
}

impl<'a> Container<'a> {
    /// The next element, or the next value without its key.
    #[inline(always)]
    fn value(&mut self) -> Option<Element<'a>> {
        let (kind, data, end) = super::read(self.values.next()?, self.data, self.value_at)?;
        self.value_at = end;
        Some(Element {
            key: None,
            kind,
            data,
        })
    }
}

/// The keys of an object, and what they look like in its text.
struct Shape<'a> {
    entries: &'a [[u8; 4]],
    data: &'a [u8],
    /// Each with what is before its value, and where that ends.
    keys: Vec<u8>,
    ends: Vec<usize>,
    /// The last of those that name the event's `_id`.
    id: Option<usize>,
    /// No key names a field that only the server sets.
    is_usual: bool,
}

#[derive(Default)]
struct Shapes<'a> {
    known: Vec<Shape<'a>>,
    /// The one to be forgotten next.
    oldest: usize,
}

impl<'a> Shapes<'a> {
    /// That of an object of which nothing was read.
    fn of(&mut self, pairs: &Container<'a>) -> Option<&Shape<'a>> {
        let entries = pairs.keys.as_slice();
        let data = pairs.data.get(..end_of(entries))?;
        let is_same = |shape: &Shape<'a>| shape.entries == entries && shape.data == data;
        let at = match self.known.iter().position(is_same) {
            Some(at) => at,
            None => {
                let shape = Shape::new(entries, data)?;
                if self.known.len() < SHAPES {
                    self.known.push(shape);
                    self.known.len() - 1
                } else {
                    let at = self.oldest;
                    self.oldest = (at + 1) % SHAPES;
                    *self.known.get_mut(at)? = shape;
                    at
                }
            }
        };
        self.known.get(at)
    }
}

impl<'a> Shape<'a> {
    fn new(entries: &'a [[u8; 4]], data: &'a [u8]) -> Option<Self> {
        let mut shape = Self {
            entries,
            data,
            keys: Vec::with_capacity(data.len() + 6 * entries.len()),
            ends: Vec::with_capacity(entries.len()),
            id: None,
            is_usual: true,
        };
        let mut at = 0;
        for (index, entry) in entries.iter().enumerate() {
            let (kind, key, end) = super::read(entry, data, at)?;
            if kind != STRING {
                return None;
            }
            at = end;
            let name = std::str::from_utf8(key).ok()?;
            if names::may_be_special(name) {
                shape.is_usual &= names::server_field(name).is_none();
                if names::field_name(name) == schema::ID {
                    shape.id = Some(index);
                }
            }
            if index > 0 {
                shape.keys.extend_from_slice(b", ");
            }
            json::write_bytes(key, &mut shape.keys);
            shape.keys.extend_from_slice(b": ");
            shape.ends.push(shape.keys.len());
        }
        Some(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Limits, split_batch, split_events};
    use crate::jsonb::tests::{Value, number, text};
    use crate::jsonb::to_text;
    use crate::testing::Random;

    fn string(text: &str) -> Value {
        Value::Text(text.to_owned())
    }

    fn object(pairs: Vec<(String, Value)>) -> Value {
        let mut pairs = pairs;
        pairs.sort_by(|(a, _), (b, _)| a.len().cmp(&b.len()).then_with(|| a.cmp(b)));
        pairs.dedup_by(|(a, _), (b, _)| a == b);
        Value::Object(pairs)
    }

    fn nested(depth: usize) -> Value {
        (0..depth).fold(string("core"), |inner, level| match level % 2 {
            0 => Value::Array(vec![inner]),
            _ => object(vec![("k".to_owned(), inner)]),
        })
    }

    fn properties(random: &mut Random) -> Value {
        // Few shapes, and many.
        let count = random.next() % 6;
        let mut pairs: Vec<(String, Value)> = (0..count)
            .map(|n| (format!("key{n}"), Value::random(random, 3)))
            .collect();
        match random.next() % 24 {
            0 => pairs.push((text(random), string("any"))),
            1 => pairs.push((
                random.pick(&["_id", "_Id", " _id", "\"_id\""]).to_owned(),
                match random.next() % 4 {
                    0 => string(&"x".repeat((random.next() % 300) as usize)),
                    1 => string(&"\"".repeat(250 + (random.next() % 10) as usize)),
                    2 => Value::Number(number(random)),
                    _ => Value::random(random, 2),
                },
            )),
            2 => pairs.push((
                random
                    .pick(&["_extra", "$serverTime", "_receivedAt"])
                    .to_owned(),
                Value::Null,
            )),
            3 => pairs.push(("deep".to_owned(), nested(60 + (random.next() % 8) as usize))),
            4 => pairs.push(("digits".to_owned(), Value::Number("1".repeat(17_000)))),
            5 => pairs.push(("long".to_owned(), string(&"y".repeat(2_000)))),
            6 => return Value::random(random, 0),
            _ => {}
        }
        object(pairs)
    }

    fn item(random: &mut Random) -> Value {
        let name = match random.next() % 16 {
            0 => Value::random(random, 4),
            1 => string(&text(random)),
            2 => string("users"),
            n => string(["PageView", "click", "a\"b"][n as usize % 3]),
        };
        let mut pairs = vec![
            ("collection".to_owned(), name),
            ("properties".to_owned(), properties(random)),
        ];
        match random.next() % 16 {
            0 => drop(pairs.pop()),
            1 => pairs[0].0 = text(random),
            2 => pairs.push((text(random), Value::Null)),
            3 => return Value::random(random, 2),
            _ => {}
        }
        object(pairs)
    }

    #[test]
    fn the_batch_is_that_of_the_text() {
        let limits = Limits {
            max_event_bytes: 1_900,
            ..Limits::default()
        };
        let mut usual = 0;
        for seed in 0..1_500 {
            let mut random = Random(seed);
            let count = random.next() % 12;
            let root = Value::Array((0..count).map(|_| item(&mut random)).collect()).root();
            let plain = to_text(&root).unwrap();
            let events = read(&root, b"old".to_vec()).unwrap();
            assert_eq!(events.text, plain, "seed {seed}");
            usual += events.items.iter().filter(|i| i.parts.is_some()).count();
            assert_eq!(
                split_events(&events, &limits),
                split_batch(&plain, &limits),
                "seed {seed}"
            );
        }
        assert!(usual > 4_000, "{usual}");
    }

    #[test]
    fn what_is_no_array_is_left_alone() {
        for value in [string("a"), Value::Null, object(Vec::new())] {
            assert!(read(&value.root(), Vec::new()).is_none());
        }
        assert!(read(&[], Vec::new()).is_none());
        let good = Value::Array((0..6).map(|n| item(&mut Random(n))).collect()).root();
        assert!(good.len() < 20_000);
        for seed in 0..5_000 {
            let mut random = Random(seed);
            let mut bytes = good.clone();
            for _ in 0..=random.next() % 4 {
                let at = (random.next() % (bytes.len() as u64)) as usize;
                bytes[at] = random.next() as u8;
            }
            // Crafted or not, both say the same, or nothing.
            if let Some(events) = read(&bytes, Vec::new()) {
                assert_eq!(Some(&events.text), to_text(&bytes).as_ref(), "seed {seed}");
            }
        }
    }
}
