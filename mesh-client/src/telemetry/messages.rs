//! gRPC messages in a stream of bytes, counted.

/// Where in the messages of a body one is. A message is five bytes (a flag and its length) and its data.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Messages {
    /// Of the prefix that is read now.
    prefix: [u8; 5],
    /// Bytes of it that were read.
    read: u8,
    /// Bytes of data to come.
    left: u32,
}

impl Messages {
    /// Takes the next bytes; how many messages end in them. `each` is told the length of each.
    pub(crate) fn take(&mut self, mut bytes: &[u8], mut each: impl FnMut(u32)) -> u64 {
        let mut ended = 0;
        let mut end = |length| {
            ended += 1;
            each(length);
        };
        while !bytes.is_empty() {
            if self.left > 0 {
                let taken = bytes.len().min(self.left as usize);
                bytes = &bytes[taken..];
                // No more than `left`, which is a u32.
                self.left -= u32::try_from(taken).unwrap_or(self.left);
                if self.left == 0 {
                    end(self.length());
                }
                continue;
            }
            self.prefix[usize::from(self.read)] = bytes[0];
            bytes = &bytes[1..];
            self.read += 1;
            if self.read == 5 {
                self.read = 0;
                self.left = self.length();
                if self.left == 0 {
                    end(0);
                }
            }
        }
        ended
    }

    /// Of the message whose prefix was read last.
    fn length(&self) -> u32 {
        let [_, length @ ..] = self.prefix;
        u32::from_be_bytes(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        let bytes = b"\0\0\0\0\x03abc\0\0\0\0\0\x01\0\0\0\x01x\0\0";
        let mut lengths = Vec::new();
        assert_eq!(Messages::default().take(bytes, |length| lengths.push(length)), 3);
        assert_eq!(lengths, [3, 0, 1]);
        let mut messages = Messages::default();
        let one_by_one: u64 = bytes.iter().map(|byte| messages.take(std::slice::from_ref(byte), |_| {})).sum();
        assert_eq!(one_by_one, 3);
        assert_eq!(messages.take(&[0, 0, 0], |_| {}), 1, "the fourth is empty, and ends with its prefix");
    }
}
