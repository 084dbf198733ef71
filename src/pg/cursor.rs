//! The result of a query that a caller wrote, some rows at a time: as the effective user, in the caller's session, with a
//! search path of its own.

use std::borrow::Cow;
use std::ffi::{CStr, CString};

use pgrx::datum::UnboxDatum;
use pgrx::{FromDatum, pg_sys};
use rakam_event::coerce::Value;
use rakam_event::number::Number;
use rakam_event::time;
use rakam_event::types::FieldType;

use super::PG_EPOCH_US;
use super::error::{PgError, Result};
use super::{settings, spi};

/// The one SELECT (or VALUES, TABLE, WITH … SELECT) that a text is, without what follows it.
///
/// Errors: 42601 no statement or several (and Postgres' own for a wrong one), 42501 another kind of statement.
pub fn single_select(sql: &str) -> Result<&str> {
    let text = CString::new(sql)
        .map_err(|_| PgError::new("22023", "a query must not contain NUL characters"))?;
    // SAFETY: NUL-terminated text; the tree is in the current memory context. Each node's tag says its type.
    unsafe {
        let list = pg_sys::raw_parser(text.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT);
        let Some(list) = list.as_ref().filter(|list| list.length == 1) else {
            return Err(PgError::new("42601", "the query must be one statement"));
        };
        let raw = (*list.elements).ptr_value.cast::<pg_sys::RawStmt>();
        let node = (*raw).stmt;
        if (*node).type_ != pg_sys::NodeTag::T_SelectStmt || !only_reads(node.cast()) {
            return Err(
                PgError::new("42501", "the statement is not allowed here")
                    .hint("Only one SELECT, VALUES, TABLE or WITH ... SELECT that changes nothing may be given."),
            );
        }
        let start = (*raw).stmt_location.max(0) as usize;
        let rest = sql.get(start..).unwrap_or(sql);
        Ok(match (*raw).stmt_len {
            0 => rest,
            n => rest.get(..n as usize).unwrap_or(rest),
        })
    }
}

/// Whether a SELECT neither makes a table nor changes rows in a WITH. (Changes are allowed by Postgres in the outermost
/// WITH only.)
///
/// # Safety
/// `select` must be a live node.
unsafe fn only_reads(select: *const pg_sys::SelectStmt) -> bool {
    // SAFETY: as the caller promises; a list has `length` elements, those of WITH are CommonTableExpr nodes.
    unsafe {
        if !(*select).intoClause.is_null() {
            return false;
        }
        let left = (*select).larg;
        if !left.is_null() && !only_reads(left) {
            return false;
        }
        let Some(ctes) = (*select)
            .withClause
            .as_ref()
            .and_then(|with| with.ctes.as_ref())
        else {
            return true;
        };
        (0..ctes.length as usize).all(|i| {
            let cte = (*ctes.elements.add(i))
                .ptr_value
                .cast::<pg_sys::CommonTableExpr>();
            let query = (*cte).ctequery;
            (*query).type_ == pg_sys::NodeTag::T_SelectStmt
        })
    }
}

/// A column of a result.
#[derive(Debug, Clone)]
pub struct Column {
    pub name: String,
    pub type_oid: pg_sys::Oid,
    pub typmod: i32,
}

impl Column {
    /// The type under which its values are written to a typed file; text for what has none of its own.
    pub fn field_type(&self) -> FieldType {
        match self.type_oid {
            pg_sys::BOOLOID => FieldType::Bool,
            pg_sys::INT2OID | pg_sys::INT4OID => FieldType::Int4,
            pg_sys::INT8OID => FieldType::Int8,
            pg_sys::FLOAT4OID => FieldType::Float4,
            pg_sys::FLOAT8OID => FieldType::Float8,
            pg_sys::DATEOID => FieldType::Date,
            pg_sys::TIMESTAMPTZOID | pg_sys::TIMESTAMPOID => FieldType::Timestamptz,
            pg_sys::NUMERICOID => match numeric(self.typmod) {
                Some((precision, scale)) => FieldType::Numeric { precision, scale },
                None => FieldType::Text,
            },
            pg_sys::UUIDOID => FieldType::Uuid,
            pg_sys::BOOLARRAYOID => FieldType::BoolArray,
            pg_sys::FLOAT4ARRAYOID | pg_sys::FLOAT8ARRAYOID => FieldType::Float8Array,
            pg_sys::TEXTARRAYOID => FieldType::TextArray,
            pg_sys::JSONBOID | pg_sys::JSONOID => FieldType::Jsonb,
            _ => FieldType::Text,
        }
    }

    /// What its values are arrays of, if they are arrays of whole numbers: [`Row::integers`] reads them.
    pub fn integers(&self) -> Option<Integers> {
        match self.type_oid {
            pg_sys::INT2ARRAYOID => Some(Integers::Bits16),
            pg_sys::INT4ARRAYOID => Some(Integers::Bits32),
            pg_sys::INT8ARRAYOID => Some(Integers::Bits64),
            _ => None,
        }
    }
}

/// Sizes of whole numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Integers {
    Bits16,
    Bits32,
    Bits64,
}

/// The elements of an array of one dimension, or of none.
///
/// # Safety
/// The datum is a live array, not NULL, whose elements are of the type `T`.
unsafe fn elements<T>(datum: pg_sys::Datum, column: &str) -> Result<Vec<Option<T>>>
where
    for<'a> T: UnboxDatum<As<'a> = T> + 'a,
{
    // SAFETY: as promised; an array that was stored compressed is copied, into the fetch's own memory.
    unsafe {
        let array = pg_sys::pg_detoast_datum(datum.cast_mut_ptr()).cast::<pg_sys::ArrayType>();
        if (*array).ndim > 1 {
            return Err(PgError::new(
                "0A000",
                format!("a value of column \"{column}\" has several dimensions, a list of a file has one"),
            )
            .hint("Cast the column to text, or make it JSON with to_jsonb."));
        }
        let items = Vec::<Option<T>>::from_datum(pg_sys::Datum::from(array), false);
        Ok(items.unwrap_or_default())
    }
}

/// Precision and scale of a numeric with a modifier, if a typed file can hold it.
fn numeric(typmod: i32) -> Option<(u8, u8)> {
    // As numeric's own typmod functions pack it: precision in the upper 16 bits, scale in the lower 11, signed.
    let packed = typmod
        .checked_sub(pg_sys::VARHDRSZ as i32)
        .filter(|&p| p >= 0)?;
    let precision = u8::try_from(packed >> 16)
        .ok()
        .filter(|p| (1..=38).contains(p))?;
    let scale = u8::try_from(((packed & 0x7ff) ^ 1024) - 1024).ok()?;
    (scale <= precision).then_some((precision, scale))
}

/// An open result. Closed when dropped; while an error unwinds, by the transaction's own cleanup.
pub struct Cursor {
    portal: pg_sys::Portal,
    columns: Vec<Column>,
    nest_level: i32,
}

impl Cursor {
    /// Runs a query, as [`single_select`] gives it, under the search path `schema`.
    pub fn open(sql: &str, schema: &str) -> Result<Self> {
        let text = CString::new(sql)
            .map_err(|_| PgError::new("22023", "a query must not contain NUL characters"))?;
        // What is temporary must not hide the project's own tables.
        let path = CString::new(format!("{}, pg_temp", spi::quote_ident(schema)))
            .map_err(|_| PgError::internal("NUL byte in a schema's name"))?;
        // SAFETY: the nest level and the SPI connection are closed in Drop, or by the transaction's end on an error; the
        // texts are copied.
        unsafe {
            let nest_level = pg_sys::NewGUCNestLevel();
            settings::save(c"search_path", &path);
            pg_sys::SPI_connect();
            let plan = pg_sys::SPI_prepare(text.as_ptr(), 0, std::ptr::null_mut());
            if plan.is_null() {
                return Err(PgError::internal("could not prepare a query"));
            }
            let portal = pg_sys::SPI_cursor_open(
                std::ptr::null(),
                plan,
                std::ptr::null_mut(),
                std::ptr::null(),
                true,
            );
            let desc = (*portal).tupDesc;
            let columns = (0..(*desc).natts)
                .map(|i| {
                    let attribute = &*attribute(desc, i as usize);
                    Column {
                        name: CStr::from_ptr(attribute.attname.data.as_ptr())
                            .to_string_lossy()
                            .into_owned(),
                        type_oid: pg_sys::getBaseType(attribute.atttypid),
                        typmod: attribute.atttypmod,
                    }
                })
                .collect();
            Ok(Self {
                portal,
                columns,
                nest_level,
            })
        }
    }

    pub fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// Calls `each` for the next rows, at most so many; answers how many there were.
    pub fn fetch(
        &mut self,
        most: u32,
        mut each: impl FnMut(&Row<'_>) -> Result<()>,
    ) -> Result<u64> {
        // SAFETY: the portal is open; SPI_tuptable has `numvals` tuples until it is freed.
        unsafe {
            pg_sys::SPI_cursor_fetch(self.portal, true, most.into());
            let (count, table) = (pg_sys::SPI_processed, pg_sys::SPI_tuptable);
            if table.is_null() {
                return Ok(0);
            }
            let mut outcome = Ok(());
            for i in 0..count as usize {
                let row = Row {
                    tuple: *(*table).vals.add(i),
                    desc: (*table).tupdesc,
                    columns: &self.columns,
                };
                outcome = each(&row);
                if outcome.is_err() {
                    break;
                }
            }
            pg_sys::SPI_freetuptable(table);
            outcome.map(|()| count)
        }
    }
}

/// An attribute of a tuple descriptor.
///
/// # Safety
/// `desc` must be a live descriptor with more than `i` attributes.
unsafe fn attribute(desc: pg_sys::TupleDesc, i: usize) -> *const pg_sys::FormData_pg_attribute {
    #[cfg(not(feature = "pg18"))]
    // SAFETY: as the caller promises.
    unsafe {
        (*desc).attrs.as_ptr().add(i)
    }
    #[cfg(feature = "pg18")]
    // SAFETY: as the caller promises.
    unsafe {
        pg_sys::TupleDescAttr(desc, i as i32)
    }
}

impl Drop for Cursor {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: closes what `open` opened, innermost first.
            unsafe {
                pg_sys::SPI_cursor_close(self.portal);
                pg_sys::SPI_finish();
                pg_sys::AtEOXact_GUC(true, self.nest_level);
            }
        }
    }
}

/// A row, valid inside of the callback only. Columns count from 0.
pub struct Row<'a> {
    tuple: pg_sys::HeapTuple,
    desc: pg_sys::TupleDesc,
    columns: &'a [Column],
}

impl Row<'_> {
    /// A column as Postgres prints it, but a boolean as a word, which other programs know.
    pub fn text(&self, column: usize) -> Option<String> {
        if self
            .columns
            .get(column)
            .is_some_and(|c| c.type_oid == pg_sys::BOOLOID)
        {
            return match self.value(column) {
                Ok(Some(Value::Bool(value))) => Some(value.to_string()),
                _ => None,
            };
        }
        // SAFETY: tuple and descriptor are live; the text is palloc'd for us, copied and freed.
        unsafe {
            let text = pg_sys::SPI_getvalue(self.tuple, self.desc, column as i32 + 1);
            if text.is_null() {
                return None;
            }
            let copy = CStr::from_ptr(text).to_string_lossy().into_owned();
            pg_sys::pfree(text.cast());
            Some(copy)
        }
    }

    /// A column of arrays of whole numbers; None for NULL, and for any other column.
    pub fn integers(&self, column: usize) -> Result<Option<Vec<Option<i64>>>> {
        let Some((about, kind)) = self
            .columns
            .get(column)
            .and_then(|about| Some((about, about.integers()?)))
        else {
            return Ok(None);
        };
        let mut is_null = false;
        // SAFETY: tuple and descriptor are live, and the column is of the array's type.
        unsafe {
            let datum =
                pg_sys::SPI_getbinval(self.tuple, self.desc, column as i32 + 1, &mut is_null);
            if is_null {
                return Ok(None);
            }
            let name = &about.name;
            Ok(Some(match kind {
                Integers::Bits16 => elements::<i16>(datum, name)?
                    .into_iter()
                    .map(|v| v.map(i64::from))
                    .collect(),
                Integers::Bits32 => elements::<i32>(datum, name)?
                    .into_iter()
                    .map(|v| v.map(i64::from))
                    .collect(),
                Integers::Bits64 => elements::<i64>(datum, name)?,
            }))
        }
    }

    /// A column as a value of its [`Column::field_type`].
    pub fn value(&self, column: usize) -> Result<Option<Value<'static>>> {
        let Some(about) = self.columns.get(column) else {
            return Ok(None);
        };
        let mut is_null = false;
        // SAFETY: tuple and descriptor are live.
        let datum = unsafe {
            pg_sys::SPI_getbinval(self.tuple, self.desc, column as i32 + 1, &mut is_null)
        };
        if is_null {
            return Ok(None);
        }
        let out_of_range = || {
            let name = &about.name;
            PgError::new(
                "22008",
                format!("value of column \"{name}\" is out of range for the file"),
            )
            .hint("Cast the column to text to keep infinite dates and times.")
        };
        let bits = datum.value();
        Ok(Some(match (about.type_oid, about.field_type()) {
            (_, FieldType::Bool) => Value::Bool(bits & 1 != 0),
            (pg_sys::INT2OID, _) => Value::Int4(i32::from(bits as i16)),
            (_, FieldType::Int4) => Value::Int4(bits as i32),
            (_, FieldType::Int8) => Value::Int8(bits as i64),
            (_, FieldType::Float4) => Value::Float4(f32::from_bits(bits as u32)),
            (_, FieldType::Float8) => Value::Float8(f64::from_bits(bits as u64)),
            (_, FieldType::Date) => {
                let days = i64::from(bits as i32) + PG_EPOCH_US / time::MICROS_PER_DAY;
                let range = time::MIN_TIME_US / time::MICROS_PER_DAY
                    ..=time::MAX_TIME_US / time::MICROS_PER_DAY;
                Value::Date(
                    range
                        .contains(&days)
                        .then_some(days as i32)
                        .ok_or_else(out_of_range)?,
                )
            }
            (_, FieldType::Timestamptz) => {
                let us = (bits as i64).checked_add(PG_EPOCH_US);
                let range = time::MIN_TIME_US..=time::MAX_TIME_US;
                Value::Timestamptz(
                    us.filter(|us| range.contains(us))
                        .ok_or_else(out_of_range)?,
                )
            }
            (_, FieldType::Uuid) => {
                // SAFETY: a uuid is a pointer to its 16 bytes.
                let uuid = unsafe { pgrx::Uuid::from_datum(datum, false) };
                Value::Uuid(uuid.map_or([0; 16], |uuid| *uuid.as_bytes()))
            }
            (_, FieldType::BoolArray) => {
                // SAFETY: the datum is an array of the column's type.
                Value::BoolArray(unsafe { elements::<bool>(datum, &about.name)? })
            }
            (pg_sys::FLOAT4ARRAYOID, _) => {
                // SAFETY: as above.
                let items = unsafe { elements::<f32>(datum, &about.name)? };
                Value::Float8Array(items.into_iter().map(|v| v.map(f64::from)).collect())
            }
            (_, FieldType::Float8Array) => {
                // SAFETY: as above.
                Value::Float8Array(unsafe { elements::<f64>(datum, &about.name)? })
            }
            (_, FieldType::TextArray) => {
                // SAFETY: as above.
                let items = unsafe { elements::<String>(datum, &about.name)? };
                Value::TextArray(items.into_iter().map(|v| v.map(Cow::Owned)).collect())
            }
            (_, FieldType::Numeric { scale, .. }) => {
                let text = self.text(column).unwrap_or_default();
                let value = Number::parse(&text).and_then(|n| n.scaled(scale));
                Value::Numeric(value.ok_or_else(out_of_range)?)
            }
            _ => Value::Text(Cow::Owned(self.text(column).unwrap_or_default())),
        }))
    }
}
