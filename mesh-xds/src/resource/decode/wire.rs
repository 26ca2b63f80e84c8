//! A reader of the protobuf wire format that borrows: for EDS, where ten thousand endpoints must not cost an
//! allocation each.

/// One field of a message.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    /// Varint.
    Varint(u64),
    /// String, bytes, message or packed list.
    Bytes(&'a [u8]),
    /// Fixed 32 or 64 bits: no field we read has this type.
    Fixed,
}

/// Iterates over the fields of one message. Ends after the first error.
#[derive(Clone, Debug)]
pub(super) struct Fields<'a> {
    rest: &'a [u8],
}

/// The bytes are not a protobuf message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

impl<'a> Fields<'a> {
    pub(super) fn of(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0u64;
        for (index, byte) in self.rest.iter().take(10).enumerate() {
            // The tenth byte holds one bit.
            if index == 9 && *byte > 1 {
                return Err(Malformed);
            }
            value |= u64::from(byte & 0x7f) << (7 * index);
            if byte & 0x80 == 0 {
                self.rest = &self.rest[index + 1..];
                return Ok(value);
            }
        }
        Err(Malformed)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.rest.split_at_checked(length).ok_or(Malformed)?;
        self.rest = rest;
        Ok(head)
    }

    fn field(&mut self) -> Result<(u32, Value<'a>), Malformed> {
        let key = u32::try_from(self.varint()?).map_err(|_| Malformed)?;
        let tag = key >> 3;
        if tag == 0 {
            return Err(Malformed);
        }
        let value = match key & 7 {
            0 => Value::Varint(self.varint()?),
            1 => self.take(8).map(|_| Value::Fixed)?,
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| Malformed)?;
                Value::Bytes(self.take(length)?)
            }
            5 => self.take(4).map(|_| Value::Fixed)?,
            // Groups do not exist in proto3.
            _ => return Err(Malformed),
        };
        Ok((tag, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u32, Value<'a>), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

impl<'a> Value<'a> {
    pub(super) fn bytes(self) -> Result<&'a [u8], Malformed> {
        match self {
            Value::Bytes(bytes) => Ok(bytes),
            _ => Err(Malformed),
        }
    }

    pub(super) fn text(self) -> Result<&'a str, Malformed> {
        std::str::from_utf8(self.bytes()?).map_err(|_| Malformed)
    }

    pub(super) fn uint32(self) -> Result<u32, Malformed> {
        match self {
            // Like protobuf: the low 32 bits.
            #[allow(clippy::cast_possible_truncation, reason = "the wire format defines truncation")]
            Value::Varint(value) => Ok(value as u32),
            _ => Err(Malformed),
        }
    }

    /// A `google.protobuf.UInt32Value`.
    pub(super) fn wrapped_uint32(self) -> Result<u32, Malformed> {
        let mut value = 0;
        for field in Fields::of(self.bytes()?) {
            if let (1, field) = field? {
                value = field.uint32()?;
            }
        }
        Ok(value)
    }
}

/// The first field as a string: the name of a Listener, RouteConfiguration, Cluster or ClusterLoadAssignment.
pub(crate) fn peek_name(bytes: &[u8]) -> Option<&str> {
    let mut name = None;
    for field in Fields::of(bytes) {
        if let (1, value) = field.ok()? {
            name = Some(value.text().ok()?);
        }
    }
    name
}
