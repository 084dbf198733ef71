//! From a row's datums into the columns of a chunk, without values in between.

use std::borrow::Cow;

use rakam_event::batch::{BatchBuilder, EventStamp};
use rakam_event::coerce::Value;
use rakam_event::entry::Limits;
use rakam_event::types::FieldType;

use super::{
    Datums, Role, Target, by_value, extra, is_by_value, is_plain, text, text_bytes_max,
    text_in_place, timestamp, value,
};
use crate::pg::Result;

/// How rows go from their datums into the columns of a chunk.
pub struct Filler {
    /// Values that are known to go into the column as they are,
    plain: Vec<Passage>,
    /// texts, of which most do,
    texts: Vec<Passage>,
    /// and what has to be looked at first.
    looked: Vec<Passage>,
    /// At least the bytes of an event's JSON, without its texts.
    json_bytes_max: usize,
}

/// From an attribute of the table to a column of the chunk.
#[derive(Debug, Clone, Copy)]
struct Passage {
    /// Among the targets.
    index: usize,
    attribute: usize,
    ty: FieldType,
    /// Among the chunk's fields.
    position: usize,
}

impl Filler {
    /// `positions` are those of the targets' fields in the chunk's schema.
    pub fn new(targets: &[Target], positions: &[usize]) -> Self {
        let mut filler = Self {
            plain: Vec::new(),
            texts: Vec::new(),
            looked: Vec::new(),
            json_bytes_max: targets
                .iter()
                .fold(2, |sum, target| sum + target.json_bytes_max()),
        };
        for (index, (target, &position)) in targets.iter().zip(positions).enumerate() {
            // A target without a type has no position.
            let ty = target.ty.unwrap_or(FieldType::Text);
            let passage = Passage {
                index,
                attribute: target.attribute,
                ty,
                position,
            };
            match target.role {
                Role::ReceivedAt => {}
                Role::Field if is_by_value(ty) => filler.plain.push(passage),
                Role::Field if ty == FieldType::Text => filler.texts.push(passage),
                _ => filler.looked.push(passage),
            }
        }
        filler
    }

    /// Appends a row; answers its `_time`. None: it may have to go another way, nothing was appended.
    pub fn fill(
        &self,
        targets: &mut [Target],
        datums: &Datums,
        builder: &mut BatchBuilder,
        stamp: &EventStamp,
        limits: &Limits,
    ) -> Result<Option<i64>> {
        let mut bytes = self.json_bytes_max;
        let (mut time_us, mut object) = (stamp.received_at_us, None);
        // Most often nothing comes in here.
        let mut values = Vec::new();
        for passage in &self.looked {
            let Some(datum) = datums.at(passage.attribute) else {
                continue;
            };
            let target = &mut targets[passage.index];
            match target.role {
                Role::Time => {
                    time_us = timestamp(target, datum)?;
                    if !stamp.takes(time_us) {
                        return Ok(None);
                    }
                }
                Role::ReceivedAt => {}
                Role::Extra => {
                    // SAFETY: the datum is of the target's type.
                    let text = unsafe { extra(target, datum)? };
                    bytes += text.len();
                    object = Some(text);
                }
                Role::Id => return Ok(None),
                Role::Field => {
                    // SAFETY: the datum is of the target's type.
                    let Some(value) = (unsafe { value(target, datum)? }) else {
                        continue;
                    };
                    if !is_plain(&value, target.ty, limits.max_string_bytes) {
                        return Ok(None);
                    }
                    bytes += text_bytes_max(&value);
                    values.push((passage.position, value));
                }
            }
        }
        for passage in &self.texts {
            let Some(datum) = datums.at(passage.attribute) else {
                continue;
            };
            // SAFETY: the datum is a text.
            let length = match unsafe { text_in_place(datum) } {
                Some(text) => text.len(),
                None => {
                    // SAFETY: as above.
                    let text = unsafe { text(datum) };
                    values.push((passage.position, Value::Text(Cow::Borrowed(text))));
                    text.len()
                }
            };
            if length > limits.max_string_bytes {
                return Ok(None);
            }
            bytes += 6 * length;
        }
        if bytes > limits.max_event_bytes || !builder.has_room(bytes) {
            return Ok(None);
        }
        for passage in &self.plain {
            if let Some(datum) = datums.at(passage.attribute) {
                // SAFETY: the datum is of the target's type.
                let value = unsafe { by_value(&targets[passage.index], passage.ty, datum)? };
                builder.put(passage.position, value);
            }
        }
        for passage in &self.texts {
            if let Some(datum) = datums.at(passage.attribute)
                // SAFETY: the datum is a text.
                && let Some(text) = unsafe { text_in_place(datum) }
            {
                builder.put_text(passage.position, text);
            }
        }
        for (position, value) in values {
            match value {
                Value::Text(text) => builder.put_text(position, &text),
                other => builder.put_value(position, other),
            }
        }
        builder.end_row(object, time_us, stamp);
        Ok(Some(time_us))
    }
}
