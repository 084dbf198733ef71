//! How far each open split was read, and how far what was read is stored.

use crate::batch::Batch;
use crate::position::Position;

/// An open split.
#[derive(Debug)]
pub(crate) struct Cursor<T> {
    pub(crate) split: String,
    /// Stored up to here.
    pub(crate) acked: Position,
    /// Given out up to here.
    pub(crate) read: Position,
    pub(crate) paused: bool,
    /// Ended or stopped: nothing more is asked of it.
    pub(crate) done: bool,
    /// What a kind of source knows beside.
    pub(crate) more: T,
}

/// The open splits, by the order in which they were opened.
#[derive(Debug)]
pub(crate) struct Cursors<T>(Vec<Cursor<T>>);

impl<T> Default for Cursors<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Cursors<T> {
    pub(crate) fn open(&mut self, split: &str, from: Position, more: T) {
        self.close(split);
        self.0.push(Cursor {
            split: split.to_owned(),
            acked: from.clone(),
            read: from,
            paused: false,
            done: false,
            more,
        });
    }

    /// True if it was open.
    pub(crate) fn close(&mut self, split: &str) -> bool {
        let before = self.0.len();
        self.0.retain(|cursor| cursor.split != split);
        self.0.len() < before
    }

    pub(crate) fn get(&mut self, split: &str) -> Option<&mut Cursor<T>> {
        self.0.iter_mut().find(|cursor| cursor.split == split)
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Cursor<T>> {
        self.0.iter_mut()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Cursor<T>> {
        self.0.iter()
    }

    /// The cursor at a place; places change when splits are opened and closed only.
    pub(crate) fn at(&mut self, place: usize) -> Option<&mut Cursor<T>> {
        self.0.get_mut(place)
    }

    /// What the batch brought is stored; splits that ended with it are closed.
    pub(crate) fn ack(&mut self, batch: &Batch) {
        for moved in &batch.moves {
            if moved.ended {
                self.close(&moved.split);
            } else if let Some(cursor) = self.get(&moved.split) {
                cursor.acked = moved.to.clone();
            }
        }
    }

    /// Back to what is stored. That a split has ended or stopped was not: it is asked again.
    pub(crate) fn rewind(&mut self) {
        for cursor in &mut self.0 {
            cursor.read = cursor.acked.clone();
            cursor.done = false;
        }
    }
}
