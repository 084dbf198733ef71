//! jsonb and arrays of it as text, without a value tree in between: read from its bytes by [`rakam_event::jsonb`].

use std::ffi::{CStr, CString};

use pgrx::callconv::{Arg, ArgAbi, BoxRet, FcInfo};
use pgrx::datum::{Datum, FromDatum, IntoDatum};
use pgrx::nullable::Nullable;
use pgrx::pg_sys;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use rakam_event::jsonb;
use rakam_event::jsonb::events::{self, Events};

use super::spare;

/// A jsonb value of SQL: its text form, one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonbText(pub String);

impl FromDatum for JsonbText {
    unsafe fn from_polymorphic_datum(
        datum: pg_sys::Datum,
        is_null: bool,
        _type_oid: pg_sys::Oid,
    ) -> Option<Self> {
        if is_null {
            return None;
        }
        // SAFETY: a non-null jsonb datum.
        unsafe {
            Some(with_bytes(datum, |bytes, plain| {
                Self(jsonb::to_text(bytes).unwrap_or_else(|| text_of_server(plain)))
            }))
        }
    }
}

/// An array of events of SQL, as jsonb.
#[derive(Debug)]
pub enum JsonbEvents {
    Array(Events),
    /// The text of something else.
    Other(String),
}

impl FromDatum for JsonbEvents {
    unsafe fn from_polymorphic_datum(
        datum: pg_sys::Datum,
        is_null: bool,
        _type_oid: pg_sys::Oid,
    ) -> Option<Self> {
        if is_null {
            return None;
        }
        // SAFETY: a non-null jsonb datum.
        unsafe {
            Some(with_bytes(datum, |bytes, plain| {
                match events::read(bytes, spare::take(jsonb::room_for(bytes))) {
                    Some(events) => Self::Array(events),
                    None => {
                        Self::Other(jsonb::to_text(bytes).unwrap_or_else(|| text_of_server(plain)))
                    }
                }
            }))
        }
    }
}

impl Drop for JsonbEvents {
    fn drop(&mut self) {
        let (Self::Array(Events { text, .. }) | Self::Other(text)) = self;
        spare::give(std::mem::take(text).into_bytes());
    }
}

// SAFETY: reads the argument by its FromDatum, for an argument that the SQL declares as jsonb.
unsafe impl<'fcx> ArgAbi<'fcx> for JsonbEvents {
    unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
        // SAFETY: as above; NULL arguments are taken as Option.
        unsafe { arg.unbox_arg_using_from_datum() }.unwrap_or_else(|| Self::Other(String::new()))
    }

    unsafe fn unbox_nullable_arg(arg: Arg<'_, 'fcx>) -> Nullable<Self> {
        // SAFETY: as above.
        unsafe { arg.unbox_arg_using_from_datum() }.into()
    }
}

// SAFETY: names the type jsonb.
unsafe impl SqlTranslatable for JsonbEvents {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(JsonbEvents);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal("jsonb"));
    const RETURN_SQL: Result<ReturnsRef, ReturnsError> =
        Ok(ReturnsRef::One(SqlMappingRef::literal("jsonb")));
}

/// Calls `read` with the bytes of a value behind its length word, and the value, neither compressed nor stored apart.
///
/// # Safety
/// A jsonb datum that is not NULL. What `read` answers must not borrow from its arguments.
unsafe fn with_bytes<T>(
    datum: pg_sys::Datum,
    read: impl FnOnce(&[u8], *mut pg_sys::varlena) -> T,
) -> T {
    // SAFETY: a jsonb datum is a varlena; its bytes are read before what was allocated here is freed.
    unsafe {
        let original = datum.cast_mut_ptr::<pg_sys::varlena>();
        let plain = pg_sys::pg_detoast_datum(original);
        let bytes = std::slice::from_raw_parts(
            pgrx::vardata_any(plain).cast::<u8>(),
            pgrx::varsize_any_exhdr(plain),
        );
        let value = read(bytes, plain);
        if plain != original {
            pg_sys::pfree(plain.cast());
        }
        value
    }
}

/// The text that the server makes, should it write a form that [`jsonb`] does not know.
///
/// # Safety
/// `plain` is a jsonb value, neither compressed nor with a short header.
unsafe fn text_of_server(plain: *mut pg_sys::varlena) -> String {
    // SAFETY: as above; the text is NUL-terminated, and copied before it is freed.
    unsafe {
        let jsonb = plain.cast::<pg_sys::Jsonb>();
        let bytes = pgrx::varsize_any(plain) as i32;
        let text = pg_sys::JsonbToCString(std::ptr::null_mut(), &raw mut (*jsonb).root, bytes);
        let owned = CStr::from_ptr(text).to_string_lossy().into_owned();
        pg_sys::pfree(text.cast());
        owned
    }
}

impl IntoDatum for JsonbText {
    fn into_datum(self) -> Option<pg_sys::Datum> {
        let text = CString::new(self.0).ok()?;
        // SAFETY: jsonb_in takes a NUL-terminated text and raises an error on bad syntax.
        unsafe {
            pgrx::direct_function_call_as_datum(
                pg_sys::jsonb_in,
                &[Some(pg_sys::Datum::from(text.as_ptr()))],
            )
        }
    }

    fn type_oid() -> pg_sys::Oid {
        pg_sys::JSONBOID
    }
}

// SAFETY: reads the argument by its FromDatum, for an argument that the SQL declares as jsonb.
unsafe impl<'fcx> ArgAbi<'fcx> for JsonbText {
    unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
        // SAFETY: as above; NULL arguments are taken as Option.
        unsafe { arg.unbox_arg_using_from_datum() }.unwrap_or_else(|| Self(String::new()))
    }

    unsafe fn unbox_nullable_arg(arg: Arg<'_, 'fcx>) -> Nullable<Self> {
        // SAFETY: as above.
        unsafe { arg.unbox_arg_using_from_datum() }.into()
    }
}

// SAFETY: the datum comes from jsonb_in.
unsafe impl BoxRet for JsonbText {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> Datum<'fcx> {
        match self.into_datum() {
            // SAFETY: a jsonb datum in the caller's memory context.
            Some(datum) => unsafe { fcinfo.return_raw_datum(datum) },
            None => fcinfo.return_null(),
        }
    }
}

// SAFETY: names the type jsonb.
unsafe impl SqlTranslatable for JsonbText {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(JsonbText);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal("jsonb"));
    const RETURN_SQL: Result<ReturnsRef, ReturnsError> =
        Ok(ReturnsRef::One(SqlMappingRef::literal("jsonb")));
}

/// An array of jsonb in the current memory context. None: a text has a NUL byte. Raises an error for what is no JSON.
pub fn array<'a>(texts: impl Iterator<Item = Option<&'a str>>) -> Option<pg_sys::Datum> {
    let (mut elements, mut nulls) = (Vec::new(), Vec::new());
    for text in texts {
        nulls.push(text.is_none());
        elements.push(match text {
            Some(text) => JsonbText(text.to_owned()).into_datum()?,
            None => pg_sys::Datum::null(),
        });
    }
    let mut count = elements.len() as i32;
    let mut first = 1;
    // SAFETY: one dimension with one flag for each element, all of which are copied; jsonb is a varlena aligned as an
    // int.
    let array = unsafe {
        if count == 0 {
            pg_sys::construct_empty_array(pg_sys::JSONBOID)
        } else {
            pg_sys::construct_md_array(
                elements.as_mut_ptr(),
                nulls.as_mut_ptr(),
                1,
                &mut count,
                &mut first,
                pg_sys::JSONBOID,
                -1,
                false,
                b'i' as std::ffi::c_char,
            )
        }
    };
    Some(pg_sys::Datum::from(array))
}

/// The elements of an array of jsonb as text. None: they are more than `max_bytes`.
///
/// # Safety
/// The datum is an array of jsonb.
pub unsafe fn array_texts(datum: pg_sys::Datum, max_bytes: usize) -> Option<Vec<Option<String>>> {
    let (mut elements, mut nulls, mut count) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
    // SAFETY: the detoasted array and what is taken out of it live in the current context.
    unsafe {
        let array = pg_sys::pg_detoast_datum(datum.cast_mut_ptr()).cast::<pg_sys::ArrayType>();
        pg_sys::deconstruct_array(
            array,
            pg_sys::JSONBOID,
            -1,
            false,
            b'i' as std::ffi::c_char,
            &mut elements,
            &mut nulls,
            &mut count,
        );
        let mut bytes = 0;
        let mut texts = Vec::with_capacity(count as usize);
        for at in 0..count as usize {
            let text = JsonbText::from_datum(*elements.add(at), *nulls.add(at)).map(|text| text.0);
            bytes += text.as_ref().map_or(0, String::len);
            if bytes > max_bytes {
                return None;
            }
            texts.push(text);
        }
        Some(texts)
    }
}

/// An array of jsonb of SQL, each element as its text.
pub struct JsonbTexts(pub Vec<Option<String>>);

// SAFETY: reads an argument that the SQL declares as jsonb[].
unsafe impl<'fcx> ArgAbi<'fcx> for JsonbTexts {
    unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
        // SAFETY: as above; the functions that take it are strict.
        unsafe { arg.unbox_arg_using_from_datum() }.unwrap_or_else(|| Self(Vec::new()))
    }
}

impl FromDatum for JsonbTexts {
    unsafe fn from_polymorphic_datum(
        datum: pg_sys::Datum,
        is_null: bool,
        _type_oid: pg_sys::Oid,
    ) -> Option<Self> {
        // SAFETY: the caller has a datum of this type.
        (!is_null)
            .then(|| unsafe { array_texts(datum, usize::MAX) })
            .flatten()
            .map(Self)
    }
}

// SAFETY: the datum is made by the server's own function.
unsafe impl BoxRet for JsonbTexts {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> Datum<'fcx> {
        match array(self.0.iter().map(Option::as_deref)) {
            // SAFETY: an array in the caller's memory context.
            Some(datum) => unsafe { fcinfo.return_raw_datum(datum) },
            None => fcinfo.return_null(),
        }
    }
}

// SAFETY: names the type jsonb[].
unsafe impl SqlTranslatable for JsonbTexts {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(JsonbTexts);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> =
        Ok(SqlMappingRef::literal("jsonb[]"));
    const RETURN_SQL: Result<ReturnsRef, ReturnsError> =
        Ok(ReturnsRef::One(SqlMappingRef::literal("jsonb[]")));
}
