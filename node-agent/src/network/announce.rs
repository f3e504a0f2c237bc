//! The frame that tells switches where a MAC address has moved to.

/// A reverse ARP request (RFC 903) from the guest's own address, padded to Ethernet's least
/// length. Sent through the VM's tap it looks as if the guest had sent it: the bridge learns the
/// tap's port, and every switch behind the uplink learns the new way. Needs no IP address, unlike
/// a gratuitous ARP (which the guest itself sends when virtio-net tells it to).
#[must_use]
pub fn rarp_frame(mac: [u8; 6]) -> [u8; 60] {
    const HEADER: [u8; 10] = [
        0x80, 0x35, // EtherType: RARP
        0, 1, // Ethernet
        0x08, 0x00, // IPv4
        6, 4, // address lengths
        0, 3, // request reverse
    ];
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    frame[12..22].copy_from_slice(&HEADER);
    frame[22..28].copy_from_slice(&mac); // sender
    frame[32..38].copy_from_slice(&mac); // target
    frame
}

#[cfg(test)]
mod tests {
    use super::rarp_frame;

    #[test]
    fn the_frame_is_a_rarp_request_of_the_guest() {
        let mac = [0x52, 0x54, 0, 1, 2, 3];
        let frame = rarp_frame(mac);
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..12], mac);
        assert_eq!(frame[12..14], [0x80, 0x35]);
        assert_eq!(frame[20..22], [0, 3]);
        assert_eq!((&frame[22..28], &frame[32..38]), (&mac[..], &mac[..]));
        assert_eq!((&frame[28..32], &frame[38..]), (&[0; 4][..], &[0; 22][..]));
    }
}
