//! The walk over an event: from its keys to slots, without normalising the same key twice, of equal names the
//! last value.

use std::collections::HashMap;
use std::ops::Range;

use crate::entry;
use crate::error::EventError;
use crate::json::{self, MAX_DEPTH};
use crate::names;
use crate::scan::{Scanned, Scanner, Unsure};
use crate::schema;

/// A table of the keys seen so far. Events of one kind have their keys in one order, so the key that followed
/// the last time is tried before the hash table.
#[derive(Default)]
struct Keys {
    index: HashMap<Box<str>, u32>,
    entries: Vec<Entry>,
    /// The entry looked up last, of which the next one is the likely successor.
    last: usize,
}

struct Entry {
    key: Box<str>,
    /// Whether JSON has to write the key as it is.
    plain: bool,
    slot: usize,
    successor: usize,
}

impl Keys {
    /// The key that most likely comes next, if events can only have it as it is.
    #[inline]
    fn expected(&self) -> Option<&str> {
        let guess = self.entries.get(self.last).map_or(0, |e| e.successor);
        let entry = self.entries.get(guess).filter(|e| e.plain)?;
        Some(&entry.key)
    }

    /// The slot of the expected key, which came.
    #[inline]
    fn take_expected(&mut self) -> Option<usize> {
        self.last = self.entries.get(self.last).map_or(0, |e| e.successor);
        self.entries.get(self.last).map(|e| e.slot)
    }

    /// The slot of a key; `make` gives it at first sight.
    fn slot(&mut self, key: &str, make: impl FnOnce() -> usize) -> usize {
        let at = match self.index.get(key) {
            Some(&at) => at as usize,
            None => {
                let at = self.entries.len();
                self.entries.push(Entry {
                    key: key.into(),
                    plain: json::plain_len(key.as_bytes()) == key.len(),
                    slot: make(),
                    successor: at + 1,
                });
                self.index.insert(key.into(), at as u32);
                at
            }
        };
        if let Some(entry) = self.entries.get_mut(self.last) {
            entry.successor = at;
        }
        self.last = at;
        self.entries[at].slot
    }
}

/// What a slot's name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NameKind {
    /// Normalised, and can be a column.
    Field,
    /// As the client wrote it, since it cannot be a column.
    Raw,
    /// Only the server sets it.
    Server,
}

/// A name that events have.
pub(crate) struct Slot {
    pub(crate) name: Box<str>,
    pub(crate) kind: NameKind,
    /// The event that had it last, and where in [`Walk::sights`] of that event it is.
    event: u64,
    sight: usize,
}

/// A value of the current event: a range of its text.
#[derive(Clone, Copy)]
pub(crate) struct Sight {
    pub(crate) slot: usize,
    start: usize,
    end: usize,
}

impl Sight {
    /// The raw value in the event that was walked.
    pub(crate) fn raw<'a>(&self, event: &'a str) -> &'a str {
        event.get(self.start..self.end).unwrap_or("null")
    }
}

/// The slots of all names seen so far, and the values of the event walked last.
pub(crate) struct Walk {
    keys: Keys,
    slots: Vec<Slot>,
    by_name: HashMap<Box<str>, usize>,
    id_slot: Option<usize>,
    extra_slot: Option<usize>,
    sights: Vec<Sight>,
    /// Of the current event: the last field that it must not have.
    server_field: Option<usize>,
    events: u64,
}

impl Walk {
    /// With slots for these fields, in this order from 0.
    pub(crate) fn new<'a>(fields: impl Iterator<Item = &'a str>) -> Self {
        let mut walk = Self {
            keys: Keys::default(),
            slots: Vec::new(),
            by_name: HashMap::new(),
            id_slot: None,
            extra_slot: None,
            sights: Vec::new(),
            server_field: None,
            events: 0,
        };
        for name in fields {
            let slot = push_slot(&mut walk.slots, name, NameKind::Field);
            walk.by_name.insert(name.into(), slot);
            match name {
                schema::ID => walk.id_slot = Some(slot),
                schema::EXTRA => walk.extra_slot = Some(slot),
                _ => {}
            }
        }
        walk
    }

    /// Takes `_extra` for a field that only the server sets, as it is to clients.
    pub(crate) fn refuse_extra(&mut self) {
        self.extra_slot = None;
        self.by_name.remove(schema::EXTRA);
    }

    /// Reads the event's values; on an error they are to be ignored. Slots may be added at the end.
    pub(crate) fn event(&mut self, event: &str) -> Result<(), EventError> {
        if let Err(Unsure) = self.scan(event) {
            self.read(event)?;
        }
        if let Some(slot) = self.server_field {
            return Err(EventError::ReservedField(self.slots[slot].name.to_string()));
        }
        self.id(event).map_or(Ok(()), entry::check_id)
    }

    /// The usual road: one pass.
    pub(crate) fn scan(&mut self, event: &str) -> Scanned<()> {
        self.begin();
        let mut scanner = Scanner::new(event);
        let mut more = scanner.open(b'{', b'}')?;
        while more {
            let came = match self.keys.expected() {
                Some(key) => scanner.key_if(key)?,
                None => false,
            };
            let slot = match came {
                true => self.keys.take_expected().ok_or(Unsure)?,
                false => self.slot(&scanner.key()?.text()?),
            };
            let value = scanner.value(MAX_DEPTH - 1)?;
            self.see(event, slot, value);
            more = scanner.more(b'}')?;
        }
        scanner.end()
    }

    /// The careful way, which knows what is wrong.
    pub(crate) fn read(&mut self, event: &str) -> Result<(), EventError> {
        json::check(event, MAX_DEPTH)?;
        self.begin();
        let base = event.as_ptr() as usize;
        json::object_entries(event, |key, raw| {
            let start = raw.as_ptr() as usize - base;
            let slot = self.slot(key);
            self.see(event, slot, start..start + raw.len());
        })
    }

    fn begin(&mut self) {
        self.events += 1;
        self.sights.clear();
        self.server_field = None;
    }

    fn slot(&mut self, key: &str) -> usize {
        let Self {
            keys,
            slots,
            by_name,
            ..
        } = self;
        keys.slot(key, || make_slot(key, slots, by_name))
    }

    /// Notes a value of the event and where it is.
    #[inline]
    fn see(&mut self, event: &str, slot: usize, value: Range<usize>) {
        let sight = Sight {
            slot,
            start: value.start,
            end: value.end,
        };
        let known = &mut self.slots[slot];
        // `_extra` is an object, written by an INSERT.
        let misplaced = self.extra_slot == Some(slot) && !sight.raw(event).starts_with('{');
        if known.kind == NameKind::Server || misplaced {
            self.server_field = Some(slot);
        }
        if known.event == self.events {
            self.sights[known.sight] = sight;
        } else {
            known.event = self.events;
            known.sight = self.sights.len();
            self.sights.push(sight);
        }
    }

    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The values of the event, each name once, in the order of their first keys.
    pub(crate) fn sights(&self) -> &[Sight] {
        &self.sights
    }

    /// Of the event walked last, the field that it must not have.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn refused(&self) -> Option<&str> {
        self.server_field.map(|slot| &*self.slots[slot].name)
    }

    /// The raw `_id` of the event walked last.
    pub(crate) fn id<'a>(&self, event: &'a str) -> Option<&'a str> {
        let slot = self.slots.get(self.id_slot?)?;
        if slot.event != self.events {
            return None;
        }
        self.sights.get(slot.sight).map(|sight| sight.raw(event))
    }
}

fn push_slot(slots: &mut Vec<Slot>, name: &str, kind: NameKind) -> usize {
    slots.push(Slot {
        name: name.into(),
        kind,
        event: 0,
        sight: 0,
    });
    slots.len() - 1
}

fn make_slot(key: &str, slots: &mut Vec<Slot>, by_name: &mut HashMap<Box<str>, usize>) -> usize {
    // An INSERT may write `_extra`; of clients it is refused at entry.
    if key == schema::EXTRA
        && let Some(&slot) = by_name.get(key)
    {
        return slot;
    }
    if let Some(field) = names::server_field(key) {
        return push_slot(slots, field, NameKind::Server);
    }
    let name = names::field_name(key);
    if !names::can_be_column(&name) {
        return push_slot(slots, key, NameKind::Raw);
    }
    match by_name.get(name.as_ref()) {
        Some(&slot) => slot,
        None => {
            let slot = push_slot(slots, &name, NameKind::Field);
            by_name.insert(name.as_ref().into(), slot);
            slot
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::roads::Roads;
    use crate::testing::Random;

    #[test]
    fn keys_keep_their_slot_in_any_order() {
        let mut keys = Keys::default();
        for round in 0..3 {
            for (slot, key) in ["a", "b", "c"].iter().enumerate() {
                assert_eq!(keys.slot(key, || slot + round * 10), slot);
            }
            assert_eq!(keys.slot("b", || 99), 1);
            assert_eq!(keys.slot("z", || 7), 7);
        }
    }

    #[test]
    fn the_last_of_equal_names_wins_in_its_first_place() {
        let mut walk = Walk::new(["_id", "user_name"].into_iter());
        let text = r#" {"userName":1,"xmin":2,"b":3,"user_name":4,"Xmin":5,"_id":"i"}"#;
        for _ in 0..2 {
            assert_eq!(walk.event(text), Ok(()));
            let seen: Vec<_> = walk
                .sights()
                .iter()
                .map(|s| (&*walk.slots()[s.slot].name, s.raw(text)))
                .collect();
            let expected = [
                ("user_name", "4"),
                ("xmin", "2"),
                ("b", "3"),
                ("Xmin", "5"),
                ("_id", "\"i\""),
            ];
            assert_eq!(seen, expected);
            assert_eq!(walk.id(text), Some("\"i\""));
        }
        assert_eq!(walk.event("{}"), Ok(()));
        assert_eq!(walk.id("{}"), None);
        let refused = walk.event(r#"{"a":1,"_Extra":{}}"#);
        assert_eq!(refused, Err(EventError::ReservedField("_extra".to_owned())));
    }

    #[test]
    fn both_roads_see_the_same() {
        let fields = ["_id", "_extra", "user_name", "a", "n"];
        let mut roads = Roads::new(&fields);
        let mut compared = 0;
        for seed in 0..20_000 {
            let mut random = Random(seed);
            let mut text = random.object(0, 12);
            if seed % 2 == 0 {
                text = random.mangled(&text);
            }
            compared += usize::from(roads.walk(&text));
        }
        assert!(compared > 10_000, "{compared}");
    }
}
