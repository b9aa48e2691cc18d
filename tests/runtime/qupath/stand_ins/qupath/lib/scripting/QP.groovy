package qupath.lib.scripting

import qupath.lib.images.ImageData
import qupath.lib.projects.Project

class QP {

    static Project project
    static ImageData opened

    static Project getProject() { project }

    static ImageData getCurrentImageData() { opened }

    static boolean setPixelSizeMicrons(ImageData imageData, Number pixelWidthMicrons, Number pixelHeightMicrons, Number zSpacingMicrons) {
        assert pixelWidthMicrons == pixelHeightMicrons
        assert zSpacingMicrons == null
        imageData.server.um = pixelWidthMicrons.doubleValue()
        true
    }

}
